"""A seekable binary file over bytes of another file or of an object in a store."""

from __future__ import annotations

import io
from abc import abstractmethod


class SeekableReader(io.RawIOBase):
    """The position in such a file. A subclass gives the end, and reads into a buffer from `_position`."""

    _position = 0

    @abstractmethod
    def _end(self) -> int:
        """The size in bytes. Called only to seek from the end, since it may cost a request."""

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always; seeking reads nothing."""
        return True

    def tell(self) -> int:
        """Bytes from the beginning."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; beyond the end there is nothing to read. Raises ValueError before the beginning."""
        origin = self._end() if whence == io.SEEK_END else self._position if whence == io.SEEK_CUR else 0
        if origin + offset < 0:
            raise ValueError(f"there is no byte {origin + offset}")
        self._position = origin + offset
        return self._position
