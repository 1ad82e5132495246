"""What surrounds a command: the terminal it writes to, its environment, and a reader that stops reading."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.guard import READER_GONE, set_up_logging
from testing.miniature import ROOT, environment

QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


@pytest.mark.parametrize("buffering", ["", "1"])
def test_a_reader_that_has_read_enough_is_no_error(buffering: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "init"],
        env=environment(PYTHONUNBUFFERED=buffering),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == b""
    assert process.wait() == READER_GONE


C_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, C_LOCALE])
def test_a_terminal_of_ascii_alone_shows_the_rest_as_escapes(env: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "café"
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "init", "quickstart", str(folder)],
        env=environment(**env),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"wrote ")
    assert b"caf\\" in done.stdout.splitlines()[0]
    assert (folder / "quickstart.yaml").exists()


def test_an_empty_log_level_is_as_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGWORLD_LOG", "")
    set_up_logging()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stages=5", "train.stages: Input should be a valid list"),
        ("train=5", "train: "),
        ("storage=5", "storage: "),
        ("sources=[1]", "sources: Input should be a valid dictionary"),
        ("model.size=[1]", "model.size"),
        ("train.stages.²=1", "is no index"),
        ("seed=2024-99-99", "is not valid YAML (month must be in 1..12)"),
        ("seed={a: 1, a: 2}", "the key 'a' occurs twice, in line 1; keep one of the two"),
        (
            "storage.root=hdfs://nowhere/run",
            "the scheme 'hdfs' cannot be used (Unable to load libjvm)",
        ),
        ("storage.root=http://127.0.0.1:9/run", "storage.root is read-only (http://); name a folder or a bucket"),
        ("storage.root=/proc/version/run", "/proc/version/run: cannot be used ("),
        ("storage.root=ftp://127.0.0.1:9/run", "ftp://127.0.0.1:9/run: cannot be used ("),
        ("storage.root=s3://", "s3://: this can be read at most, not be an output"),
        ('storage.root="a\\0b"', "a\\x00b: cannot be used ("),
    ],
)
def test_a_wrong_override_is_one_sentence(override: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", QUICKSTART, "--set", override]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("ringworld: ")
    assert said in told


@pytest.mark.parametrize("key", ["sources.plays.urls", "sources.clips.side", "text_tokenizer.path", "model.init"])
@pytest.mark.parametrize(
    "url",
    [
        "nosuch://user:hush@127.0.0.1:9/x.csv",
        "ftp://user:hush@127.0.0.1:9/x.csv",
        "zip://x.csv::http://user:hush@127.0.0.1:9/x.zip",
        "s3://user:hush@bucket/x.csv",
    ],
)
def test_a_url_that_cannot_be_read_is_one_sentence_without_its_password(
    key: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    value = f"[{url!r}]" if key.startswith("sources") else url
    assert main(["plan", QUICKSTART, "--set", "evaluate.needle=null", "--set", f"{key}={value}"]) == 2
    told = capsys.readouterr().err
    assert "127.0.0.1" in told or "s3://bucket" in told
    assert "hush" not in told


def test_device_memory_is_a_finite_number(capsys: pytest.CaptureFixture[str]) -> None:
    for number in ("inf", "nan", "0"):
        assert main(["plan", QUICKSTART, "--memory", "--gpu-memory", number]) == 2
        assert "--gpu-memory is a positive number of GiB" in capsys.readouterr().err


def test_a_folder_for_temporary_files_that_is_too_deep_for_sockets_is_named(tmp_path: Path) -> None:
    for depth in (2, 9):  # too deep for Ray's own sockets, and for those of its dashboard
        folder = tmp_path.joinpath(*["twenty-characters-of"] * depth)
        folder.mkdir(parents=True)
        script = "from pipelines.cluster import ray_cluster as c\nwith c.ray_instance(None, c.Capacity()): pass"
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment(TMPDIR=str(folder)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"UserError: TMPDIR={folder}: Ray cannot have its files and sockets there (" in done.stderr
        assert "set TMPDIR to a folder with a path of 40 characters at most" in done.stderr
