"""`ringworld trace SHARD KEY`: print the objects, frames and settings that a packed sequence came from, and itself."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from storage.printable import printable

HELP = "print which objects, frames and settings a packed sequence came from, decoded to text and frames"

_SHOWN = 300  # characters of a text; --json has all of it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("shard", help="a shard of a run, ROOT/stages/pack-*/shards/*.tar; any fsspec URL")
    parser.add_argument("key", help="the sequence's key, as the loader and the shard's members name it")
    parser.add_argument("--json", action="store_true", help="print JSON for machines, with the texts whole")
    parser.add_argument("--out", metavar="FOLDER", help="decode the frames to PNG files in this folder")


def call(arguments: argparse.Namespace) -> int:
    """Print the lineage; with --out also write the frames."""
    from pipelines.inspect.trace import describe, find, save_frames

    traced = find(arguments.shard, arguments.key)
    description = describe(traced)
    if arguments.out is not None:
        save_frames(traced, description, arguments.out)
    print(json.dumps(description, indent=1) if arguments.json else "\n".join(_lines(description)))
    return 0


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['key']} in {found['shard']}"
    yield f"  {found['filled']} of {found['context']} tokens filled, objective {found['objective']}"
    for name, stage in found["stages"].items():
        yield f"  {name:<16} {stage['fingerprint'][:16]}  {stage['folder']}"
    tokenizer = found["text_tokenizer"]
    yield f"  text tokenizer   {tokenizer['fingerprint'][:16]}  {tokenizer['url']}"
    if found["vqgan"]:
        yield f"  VQGAN weights    {found['vqgan']['fingerprint'][:16]}"
    for document in found["documents"]:
        yield from _document(document)


def _document(document: dict[str, Any]) -> Iterator[str]:
    start, end = document["tokens"]
    low, high = document["document_range"]
    yield f"tokens {start}..{end}: {printable(document['key'])} of {document['source']}, its tokens {low}..{high}"
    for name, value in document["object"].items():
        yield f"  {name:<8} {printable(value if isinstance(value, str) else json.dumps(value))}"
    yield f"  {'fields':<8} {document['fields']}"
    for piece in document["content"]:
        if "text" in piece:
            text, length = piece["text"], len(piece["text"])
            rest = f" ... ({length} characters)" if length > _SHOWN else ""
            yield f'  "{printable(text[:_SHOWN])}"{rest}'
        if "modality" in piece:
            yield f"  {piece['tokens']} tokens of {piece['modality']}"
        for frame in piece.get("frames", ()):
            time = "" if frame["time"] is None else f" at {frame['time']:g} s"
            cut = "" if frame["whole"] else ", cut by the sequence's edge"
            file = f" -> {frame['file']}" if "file" in frame else ""
            yield f"  frame {frame['number']}{time}{cut}{file}"
