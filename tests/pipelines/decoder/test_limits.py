"""Processor time: what an answer may take, in seconds of its process, as the kernel holds it."""

from __future__ import annotations

import json
import subprocess
import sys

from pipelines.decoder.limits import SECONDS_A_FRAME, SECONDS_A_MIB
from testing.miniature import environment

# The seconds left, after each of these, of a process that may take 30 of its own.
SCRIPT = """
import json, resource, time
from pipelines.decoder.limits import Stopwatch
stopwatch, found = Stopwatch(30), []
def note():
    found.append(resource.getrlimit(resource.RLIMIT_CPU)[0] - time.process_time())
stopwatch.begin(); note()
for _ in range(1000): stopwatch.has_read(60)
note()
for _ in range(1600): stopwatch.has_read(1 << 16)
note()
for _ in range(450): stopwatch.has_delivered(32)
note()
stopwatch.begin(); note()
print(json.dumps(found))
"""


def test_an_answer_may_take_more_by_what_it_has_read_and_delivered_and_the_next_begins_anew() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, env=environment(), check=True, text=True)
    achieved = [0.0, 60_000 / 2**20 * SECONDS_A_MIB, 100 * SECONDS_A_MIB, 14_400 * SECONDS_A_FRAME]
    expected = [30 + sum(achieved[: number + 1]) for number in range(4)] + [30]
    for left, most in zip(json.loads(done.stdout), expected, strict=True):
        assert -1 <= left - most <= 3, "whole seconds, and not every read asks the kernel"


def test_film_has_more_than_it_takes_and_a_few_bytes_do_not() -> None:
    hour = 3600
    film = 120 + hour * 2e6 / 8 / 2**20 * SECONDS_A_MIB  # 4K at 2 Mbit/s
    assert film > hour * 24 * 0.13
    dark = 120 + hour * 100e3 / 8 / 2**20 * SECONDS_A_MIB + 4 * hour * SECONDS_A_FRAME  # at 100 kbit/s
    assert dark > hour * 24 * 0.03
    assert 60_000 / 2**20 * SECONDS_A_MIB < 5  # 60 KB
