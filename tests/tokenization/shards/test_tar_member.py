"""Headers from a template are those that `tarfile` writes."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenization.shards.tar_member import end, header, padding


@given(st.text("abcXYZ019-_.", min_size=1, max_size=100), st.integers(0, 8**11 - 1))
def test_a_header_is_that_of_a_new_member(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("sizes", [[], [0], [1, 511, 512], [513, 9000], [10240 - 2 * 512 - 512, 0]])
def test_an_archive_ends_as_one_of_tarfile(sizes: list[int]) -> None:
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for size in sizes:
            info = tarfile.TarInfo(f"{size}.json")
            info.size = size
            tar.addfile(info, io.BytesIO(b"x" * size))
    members = b"".join(header(f"{size}.json", size) + b"x" * size + padding(size) for size in sizes)
    assert members + end(len(members)) == expected.getvalue()


@pytest.mark.parametrize(("name", "size"), [("x" * 101, 1), ("x", 8**11)])
def test_what_needs_another_header_is_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match="no plain header"):
        header(name, size)
