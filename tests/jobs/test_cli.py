"""What all commands have in common: one level of logging for all rooms."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from jobs.cli import set_up_logging


@pytest.fixture(autouse=True)
def root() -> Iterator[None]:
    log = logging.getLogger("ringworld")
    before = log.level
    yield
    log.setLevel(before)


@pytest.mark.parametrize("level", [None, "DEBUG", "info", "Error"])
def test_ringworld_log_governs_the_loggers_of_every_room(level: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if level:
        monkeypatch.setenv("RINGWORLD_LOG", level)
    else:
        monkeypatch.delenv("RINGWORLD_LOG", raising=False)
    set_up_logging()
    for name in ("ringworld", "ringworld.model.checkpoint.loader", "ringworld.storage.retry"):
        assert logging.getLevelName(logging.getLogger(name).getEffectiveLevel()) == (level or "info").upper()
