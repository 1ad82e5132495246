"""One thin file a command: parse, call a pipeline, print. The only room that reads argv and the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# `python -m jobs.run` looks in the working directory first. Where this room is not from there, no other is to be.
if sys.path[0] == os.getcwd() and Path(sys.path[0]) != Path(__file__).parents[1]:
    del sys.path[0]
