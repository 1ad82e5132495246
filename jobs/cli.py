"""The `ringworld` command: one subcommand a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs import (
    bench,
    chat,
    clean,
    eval,
    export,
    generate,
    import_lwm,
    import_vqgan,
    init,
    inspect,
    plan,
    run,
    show,
    trace,
)
from jobs.guard import run_command

_DESCRIPTION = "Raw video and text in object storage in, a million-token video-language model out, on a Ray cluster."

_COMMANDS = (
    *(init, run, plan, inspect, show, trace),
    *(export, import_lwm, import_vqgan, generate, chat, eval),
    *(clean, bench),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; the exit code is 2 for a user's mistake, and 128 + N where signal N stops the command."""
    parser = argparse.ArgumentParser(prog="ringworld", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(call=module.call)
    return run_command(parser, argv)


if __name__ == "__main__":
    sys.exit(main())
