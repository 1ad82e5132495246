"""`ringworld import-vqgan FILE --out DIR`: LWM's released VQGAN as the folder of a diffusers `VQModel`."""

from __future__ import annotations

import argparse

from storage.printable import printable

HELP = "write LWM's released VQGAN as the folder of a diffusers VQModel; nothing in its file is executed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("file", metavar="FILE", help="the released pickle, or an .npz of its arrays; any fsspec URL")
    parser.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder; any fsspec URL")
    parser.add_argument("--resolution", type=int, default=256, help="of its frames in pixels (default 256)")


def call(arguments: argparse.Namespace) -> int:
    """Import and print what was written."""
    from pipelines.export.from_lwm import import_vqgan
    from storage.store import Store

    target = Store(arguments.out.rstrip("/") or arguments.out)
    vqgan = import_vqgan(arguments.file, target, arguments.resolution)
    sizes = f"{vqgan.config.codebook_size} codes, {vqgan.config.resolution} px"
    print(printable(f"{target.path()}: {sizes}, {vqgan.fingerprint[:16]}"))
    return 0
