"""The `ringworld` command: one subcommand a file."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from jobs import bench, init, inspect, plan, run, trace
from pipelines.cluster.stop_signals import stop_signals
from storage.errors import UserError

USER_MISTAKE = 2
_COMMANDS: tuple[ModuleType, ...] = (init, run, plan, inspect, trace, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; the exit code is 2 for a user's mistake, and 128 + N where signal N stops the command."""
    parser = argparse.ArgumentParser(prog="ringworld", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(call=module.call)
    arguments = parser.parse_args(argv)
    set_up_logging()
    return guarded(arguments)


_DESCRIPTION = "Raw video and text in object storage in, a million-token video-language model out, on a Ray cluster."


def guarded(arguments: argparse.Namespace) -> int:
    """Run a parsed command. A UserError becomes one line on stderr and exit code 2, and so does SIGINT, SIGTERM or
    SIGHUP, with 128 and its number.
    """
    with stop_signals.handled():
        try:
            return int(arguments.call(arguments) or 0)
        except UserError as error:
            print(f"ringworld: {error}", file=sys.stderr)
            return USER_MISTAKE
        except KeyboardInterrupt:
            stopped_by = stop_signals.received or signal.SIGINT
            print(f"ringworld: stopped by {stopped_by.name}; run the same command again to carry on", file=sys.stderr)
            return 128 + stopped_by


def set_up_logging() -> None:
    """One event a line on stderr; the level comes from RINGWORLD_LOG (default INFO)."""
    level = os.environ.get("RINGWORLD_LOG", "INFO").upper()
    logging.basicConfig(format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("ringworld").setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
