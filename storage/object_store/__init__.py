"""Object stores behind fsspec: s3://, gs:// and az:// through `obstore`, with the options that their users know.

`register` makes fsspec use them in this process, so that every room opens, lists and writes such URLs the same way.
"""

from __future__ import annotations

from functools import cache

import fsspec

_CLASSES = {"S3": ("s3", "s3a"), "GCS": ("gs", "gcs"), "Azure": ("az", "abfs")}


@cache
def register() -> None:
    """Let fsspec, in this process, open the URLs of these schemes by `storage.object_store.filesystem`."""
    for name, schemes in _CLASSES.items():
        for scheme in schemes:
            fsspec.register_implementation(scheme, f"storage.object_store.filesystem.{name}FileSystem", clobber=True)
