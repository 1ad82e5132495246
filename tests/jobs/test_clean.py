"""`ringworld clean` lists what is not needed with sizes and reasons, and removes it with `--yes`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from pipelines.dag.manifest import MANIFEST
from storage.lease import lease
from storage.store import Store
from tests.pipelines.clean.made_run import Run, listed, without_ray

Clean = Callable[..., tuple[int, str, str]]


@pytest.fixture
def clean(capsys: pytest.CaptureFixture[str]) -> Clean:
    """Exit code, and what was said on stdout and stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = main(["clean", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def grown(tmp_path: Path) -> Iterator[Run]:
    """Made over two objects, then over another."""
    with without_ray():
        run = Run(Store(str(tmp_path / "run")), [listed("a"), listed("b")])
        run.make()
        later = replace(run, objects=[listed("c")])
        later.make()
        yield later


def test_nothing_is_removed_without_yes_and_what_would_be_is_listed_with_its_size_and_reason(
    grown: Run, clean: Clean
) -> None:
    root = grown.root.path()
    before = grown.root.names()
    code, out, _ = clean(root)
    assert (code, grown.root.names()) == (0, before)
    header, *rows, total = out.splitlines()
    assert header.split(None, 3) == ["folder", "files", "size", "why it is not needed"]
    (row,) = (row for row in rows if f"{root}/stages/tokenize/documents " in row)
    assert row.endswith("no stage that is needed lists these documents")
    assert (row.split()[1], row.split()[3]) == ("2", "KiB")
    assert total.startswith("in all 18 files, ")
    assert total.endswith(" KiB; nothing is removed without --yes")
    code, out, _ = clean(root, "--yes")
    assert code == 0
    assert out.splitlines()[-1].startswith("removed 18 files, ")
    lists, after = "/records/", grown.root.names()  # of records, of which one is written for two
    assert (
        len([name for name in after if lists not in name]) == len([name for name in before if lists not in name]) - 18
    )
    assert clean(root)[1] == "nothing here that is not needed\n"
    assert grown.is_done


def test_json_has_the_same_for_machines(grown: Run, clean: Clean) -> None:
    listing = json.loads(clean(grown.root.path(), "--json")[1])
    assert listing["removed"] is None
    (shards,) = (one for one in listing["unneeded"] if one["folder"].endswith("/shards"))
    assert (shards["files"], shards["bytes"]) == (2, 2 * 10_240)
    done = json.loads(clean(grown.root.path(), "--json", "--yes")[1])
    assert done["unneeded"] == listing["unneeded"]
    assert done["removed"]["files"] == sum(one["files"] for one in listing["unneeded"])
    assert done["removed"]["bytes"] == sum(one["bytes"] for one in listing["unneeded"])


def test_what_cannot_be_cleaned_is_one_sentence_and_exit_code_2(grown: Run, clean: Clean, tmp_path: Path) -> None:
    code, out, err = clean(tmp_path, "--yes")
    assert (code, out) == (2, "")
    assert err == f"ringworld: {tmp_path}: no run, which has a folder stages; give the storage.root of one\n"
    before = grown.root.names()
    with lease(grown.root):
        code, out, err = clean(grown.root.path(), "--yes")
    assert (code, out) == (2, "")
    assert "another driver" in err
    assert grown.root.names() == before


@pytest.mark.faults
def test_a_recipe_that_is_given_keeps_what_it_would_use_although_others_are_later(
    undisturbed: Path, clean: Clean, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    assert "nothing here that is not needed" in clean(root)[1]
    (own,) = (root / "stages" / "report").iterdir()
    later = own.with_name("f" * 16)
    shutil.copytree(own, later)
    manifest: dict[str, Any] = json.loads((later / MANIFEST).read_text())
    (later / MANIFEST).write_text(json.dumps(manifest | {"finished": "2099-01-01T00:00:00+00:00"}))
    assert f"superseded by {later.name} of 2099-01-01" in clean(root)[1]
    recipe = ("--recipe", undisturbed.parent / "recipe.yaml")
    assert "nothing here that is not needed" in clean(root, *recipe, "--set", f"storage.root={root}")[1]
    code, _, err = clean(root, *recipe)
    assert code == 2
    assert f"its storage.root is {undisturbed}, which is none of the runs given" in err
