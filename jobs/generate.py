"""`ringworld generate text|images|video DIR PROMPT`: what a trained model makes of words, pictures and films."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from storage.errors import UserError
from storage.printable import printable

HELP = "text, pictures or a film out of an exported or imported model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="text|images|video")
    text = kinds.add_parser("text", help="continue a text, greedily unless a temperature is given")
    images = kinds.add_parser("images", help="draw pictures of a text")
    video = kinds.add_parser("video", help="draw a film of a text, or continue one")
    for kind in (text, images, video):
        kind.add_argument("model", metavar="DIR", help="the folder of an exported or imported model; any fsspec URL")
        optional: dict[str, Any] = {"nargs": "?", "default": ""} if kind is video else {}
        kind.add_argument("prompt", metavar="PROMPT", help="- reads it from standard input", **optional)
        kind.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
        kind.add_argument("--top-p", type=float, metavar="P", help="draw among the fewest tokens of this probability")
        kind.add_argument("--seed", type=int, default=0)
        kind.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
        kind.add_argument("--dtype", choices=("fp32", "bf16"), help="by default bf16 on a GPU, else fp32")
        kind.add_argument("--json", action="store_true", help="print what was made, for machines")
    text.add_argument("--temperature", type=float, default=0.0)
    text.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    text.add_argument("--media", action="append", default=[], metavar="FILE", help="a picture or film before the text")
    text.add_argument("--frames", type=int, default=8, metavar="N", help="of each film that are shown (default 8)")
    for kind in (images, video):
        kind.add_argument("--temperature", type=float, default=1.0)
        kind.add_argument("--guidance", type=float, metavar="S", help="of the text; by default LWM's, 5 for a picture")
        kind.add_argument("--out", metavar="FILE", required=True, help="where to write; see docs/generating.md")
    images.add_argument("-n", type=int, default=1, help="how many, each in a file of its own")
    video.add_argument("--frames", type=int, default=16, metavar="N", help="to draw (default 16)")
    video.add_argument("--continue", dest="continues", metavar="FILE", help="a film to go on with")
    video.add_argument("--given", type=int, default=8, metavar="N", help="the last frames of it to begin with (8)")


def call(arguments: argparse.Namespace) -> int:
    """Make it and say where it is."""
    from pipelines.inference.loaded import load

    prompt = sys.stdin.read().removesuffix("\n") if arguments.prompt == "-" else arguments.prompt
    if arguments.kind == "video" and not prompt and not arguments.continues:
        raise UserError("generate video: there is neither a PROMPT nor --continue FILE; give one of them")
    model = load(arguments.model, arguments.device, arguments.dtype)
    drawn: dict[str, Any] = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "seed")}
    if arguments.kind == "text":
        shown = {"media": arguments.media, "frames": arguments.frames}
        answer = model.generate(prompt, arguments.max_new_tokens, **drawn, **shown)
        print(json.dumps({"text": answer}) if arguments.json else answer)
        return 0
    drawn["guidance"] = arguments.guidance
    draw = _draw_images if arguments.kind == "images" else _draw_video
    files = draw(model, prompt, arguments, drawn)
    print(json.dumps({"files": files}) if arguments.json else "\n".join(map(printable, files)))
    return 0


def _draw_images(model: Any, prompt: str, arguments: argparse.Namespace, drawn: dict[str, Any]) -> list[str]:
    from pipelines.inference.media import numbered, write_image

    files = numbered(arguments.out, arguments.n)
    for file, image in zip(files, model.images(prompt, arguments.n, **drawn)):
        write_image(image, file)
    return files


def _draw_video(model: Any, prompt: str, arguments: argparse.Namespace, drawn: dict[str, Any]) -> list[str]:
    from tqdm import tqdm

    from pipelines.inference.media import check_film

    check_film(arguments.out)
    with tqdm(total=arguments.frames, unit="frame", disable=None) as bar:
        continued = {"continues": arguments.continues, "given": arguments.given}
        film = model.video(prompt, arguments.frames, **continued, **drawn, on_frame=lambda _: bar.update())
    film.save(arguments.out)
    return [arguments.out]
