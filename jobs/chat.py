"""`ringworld chat DIR [QUESTION]`: ask a trained model about pictures and films, once or in a conversation."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from storage.errors import UserError
from storage.printable import printable

if TYPE_CHECKING:
    from pipelines.inference.chat import Conversation

HELP = "ask an exported or imported model about pictures and films, once or in a conversation"
_SHOW, _END = "/show", ("/end", "/quit", "/exit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of this command."""
    parser.add_argument("model", metavar="DIR", help="the folder of an exported or imported model; any fsspec URL")
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="asked once; without it, a conversation")
    parser.add_argument("--media", action="append", default=[], metavar="FILE", help="a picture or film to talk about")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="of each film that are shown (default 8)")
    parser.add_argument("--system", metavar="TEXT", help="what stands before the conversation; by default LWM's words")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="by default bf16 on a GPU, else fp32")


def call(arguments: argparse.Namespace) -> int:
    """Ask once, or until the input ends."""
    from pipelines.inference.chat import SYSTEM, Conversation
    from pipelines.inference.loaded import load

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    model = load(arguments.model, arguments.device, arguments.dtype)
    conversation = Conversation(model, arguments.system or SYSTEM, **settings)
    if arguments.question is not None:
        print(printable(conversation.say(arguments.question, arguments.media, arguments.frames)))
        return 0
    _talk(conversation, list(arguments.media), arguments.frames)
    return 0


def _talk(conversation: Conversation, media: list[str], frames: int) -> None:
    is_asked = sys.stdin.isatty()
    if is_asked:
        print(f"{_SHOW} FILE shows a picture or film with what you say next; {_END[0]} or Ctrl-D ends.")
    while True:
        print("> " if is_asked else "", end="", flush=True)
        line = sys.stdin.readline()
        said = line.strip()
        if not line or said in _END:
            return
        if said.startswith(f"{_SHOW} "):
            media += shlex.split(said.removeprefix(_SHOW))
            continue
        if not said:
            continue
        try:
            print(printable(conversation.say(said, media, frames)), flush=True)
            media = []
        except UserError as error:
            if not is_asked:
                raise
            print(printable(f"ringworld: {error}"), file=sys.stderr)
            media = []
