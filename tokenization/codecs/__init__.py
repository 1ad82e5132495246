"""Codecs that turn media into tokens and back."""
