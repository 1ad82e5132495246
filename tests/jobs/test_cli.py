"""What all commands have in common: one level of logging for all rooms."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from jobs.cli import main
from jobs.guard import USER_MISTAKE, set_up_logging


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


def test_an_unknown_log_level_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGWORLD_LOG", "loud")
    assert main(["init", "quickstart"]) == USER_MISTAKE
    said = capsys.readouterr().err
    assert said.startswith("ringworld: RINGWORLD_LOG=loud: no such log level; set one of CRITICAL, FATAL, ERROR,")
    assert said.count("\n") == 1


def test_names_and_reasons_cannot_write_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    set_up_logging()
    try:
        raise ValueError("in\ntwo lines")
    except ValueError:
        logging.getLogger("ringworld").exception("quarantined %s: %s", "a\x1b[2J\nb.mp4", "é is, \u202e is not")
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith(r"quarantined a\x1b[2J\nb.mp4: é is, \u202e is not")
    assert said[-2:] == ["ValueError: in", "two lines"]
    assert main(["run", "none\x1b[2J.yaml"]) == USER_MISTAKE
    assert capsys.readouterr().err.startswith(r"ringworld: none\x1b[2J.yaml: no such recipe file")
