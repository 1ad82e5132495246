"""How every command runs: with logging set up, and with exit codes in place of tracebacks for what a user can mend."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

from pipelines.cluster.stop_signals import stop_signals
from storage.errors import UserError
from storage.printable import printable

USER_MISTAKE = 2


def guarded(arguments: argparse.Namespace) -> int:
    """Run a parsed command and return its exit code.

    A UserError becomes one line on stderr and exit code 2; SIGINT, SIGTERM or SIGHUP one line and 128 + the signal.
    """
    with stop_signals.handled():
        try:
            set_up_logging()
            return int(arguments.call(arguments) or 0)
        except UserError as error:
            print(f"ringworld: {printable(str(error))}", file=sys.stderr)
            return USER_MISTAKE
        except KeyboardInterrupt:
            stopped_by = stop_signals.received or signal.SIGINT
            print(f"ringworld: stopped by {stopped_by.name}; run the same command again to carry on", file=sys.stderr)
            return 128 + stopped_by


def set_up_logging() -> None:
    """One event a line on stderr, at the level that RINGWORLD_LOG names (default INFO). UserError on an unknown one."""
    level, levels = os.environ.get("RINGWORLD_LOG", "INFO"), logging.getLevelNamesMapping()
    if level.upper() not in levels:
        raise UserError(f"RINGWORLD_LOG={level}: no such log level; set one of {', '.join(levels)}, or unset it")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("ringworld").setLevel(level.upper())


class _OneLine(logging.Formatter):
    """Names and reasons in a message are of files from anywhere: what a terminal would interpret is escaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = printable(record.message)
        return super().formatMessage(record)
