"""Bytes on a disk or in an object store: one atomic, fenced folder on any fsspec URL. Knows no Ray."""
