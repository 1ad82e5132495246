"""`ringworld export RUN|STAGE|CHECKPOINT --out DIR`: write a trained model as a folder that stands alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from storage.printable import printable

HELP = "write a trained model as a folder that stands alone: weights, tokenizer, codec, vocabulary and model card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument(
        "trained",
        metavar="RUN|STAGE|CHECKPOINT",
        help="a run's root (its last trained stage), the folder of a training stage or of a checkpoint; any fsspec URL",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder; any fsspec URL")
    parser.add_argument("--stage", metavar="NAME", help="of a run, the training stage whose model is meant")
    best = "the training stage's checkpoint of least held-out loss (train.heldout), not the model that it left"
    parser.add_argument("--best", action="store_true", help=best)
    parser.add_argument("--replace", action="store_true", help="replace another model that was exported there")
    parser.add_argument("--json", action="store_true", help="print what ringworld.json has, for machines")


def call(arguments: argparse.Namespace) -> int:
    """Export and print what was written."""
    from pipelines.export.trained import find_trained
    from pipelines.export.write import export_model
    from storage.store import Store

    target = Store(arguments.out.rstrip("/") or arguments.out)
    written = export_model(find_trained(arguments.trained, arguments.stage, arguments.best), target, arguments.replace)
    if arguments.json:
        print(json.dumps(asdict(written), indent=1))
        return 0
    origin = written.origin
    print(
        printable(f"{target.path()}: {written.name}, of {origin.stage} ({origin.fingerprint[:16]}), step {origin.step}")
    )
    for name in written.files:
        print(f"  {printable(name)}")
    return 0
