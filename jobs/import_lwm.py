"""`ringworld import-lwm CHECKPOINT --config CONFIG --out DIR`: LWM's weights as a folder that stands alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from storage.printable import printable

HELP = "write a released LWM checkpoint as the folder of a plain Hugging Face Llama that stands alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="LWM's file, with or without params::, flax_params:: or trainstate:: before it; any fsspec URL",
    )
    parser.add_argument(
        "--config",
        metavar="FILE|SIZE",
        required=True,
        help="the JSON of its configuration, LWM's or Hugging Face's, or a size (7B) with --context and --rope-theta",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder; any fsspec URL")
    parser.add_argument("--context", metavar="TOKENS", type=int, help="in place of the configuration's own")
    parser.add_argument("--rope-theta", metavar="THETA", type=float, help="in place of the configuration's own")
    parser.add_argument("--tokenizer", metavar="FILE", help="its tokenizer.model or tokenizer.json, or their folder")
    parser.add_argument("--vqgan", metavar="FILE", help="its VQGAN: LWM's file, or a folder of a diffusers VQModel")
    parser.add_argument("--resolution", type=int, default=256, help="of the VQGAN's frames in pixels (default 256)")
    parser.add_argument("--codes", type=int, help="of its VQGAN, where the checkpoint has other vision ids than LWM's")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights written; by default the file's")
    parser.add_argument("--replace", action="store_true", help="replace another model that was written there")
    parser.add_argument("--json", action="store_true", help="print what ringworld.json has, for machines")


def call(arguments: argparse.Namespace) -> int:
    """Import and print what was written."""
    import torch

    from pipelines.export.from_lwm import LWMFiles, import_lwm
    from storage.store import Store

    given = {name: value for name, value in vars(arguments).items() if name in LWMFiles.__dataclass_fields__}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, None: None}
    files = LWMFiles(**{**given, "dtype": dtypes[arguments.dtype]})
    target = Store(arguments.out.rstrip("/") or arguments.out)
    written = import_lwm(files, target, arguments.replace)
    if arguments.json:
        print(json.dumps(asdict(written), indent=1))
        return 0
    print(printable(f"{target.path()}: {written.name} ({written.origin.fingerprint[:16]}), {written.origin.precision}"))
    for name in written.files:
        print(f"  {printable(name)}")
    return 0
