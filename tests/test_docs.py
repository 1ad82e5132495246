"""What the documents say is held by a test is held by one that exists, and what they link to is there.

Tests are found by reading files, not by running them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("docs/*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
NAMED = re.compile(r"`(tests/[\w./]*)?(?:::(\w+))?`")
LINK = re.compile(r"\]\(([^)\s#:]+)(#[\w-]+)?\)")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def named_tests(text: str) -> Iterator[tuple[str, str]]:
    """File or folder, and test ("": all), of each that a row or paragraph names; `::name` is of the file before it."""
    path = ""
    for found in NAMED.finditer(text):
        path = found[1] or path
        if found[0] != "``":
            yield path, found[2] or ""


def rows_and_paragraphs(text: str) -> Iterator[str]:
    for block in text.split("\n\n"):
        yield from block.splitlines() if block.startswith("|") else [block]


def unheld_rows(text: str) -> list[str]:
    """The rows of the tables whose last column is "held by" that name no test there."""
    rows: list[str] = []
    for block in text.strip().split("\n\n"):
        head, *others = block.splitlines()
        if head.endswith("| held by |"):
            rows += [row for row in others[1:] if not any(name for _, name in named_tests(row.split(" | ")[-1]))]
    return rows


def exists(path: str, name: str) -> bool:
    file = ROOT / path
    return name in functions_in(file) if name else file.exists()


@cache
def functions_in(file: Path) -> frozenset[str]:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file.is_file() else ()
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef))


@each_page
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    named = [one for part in rows_and_paragraphs(page.read_text(encoding="utf-8")) for one in named_tests(part)]
    assert not [one for one in named if not exists(*one)]


@each_page
def test_every_row_that_a_test_is_to_hold_names_it(page: Path) -> None:
    assert not unheld_rows(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["formats", "security"])
def test_of_bad_and_hostile_data_every_table_says_what_holds_it(name: str) -> None:
    text = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
    heads = re.findall(r"^(\|.*)\n\|[-|]+$", text, re.MULTILINE)
    assert len(heads) > 5
    assert [head for head in heads if not head.endswith("| held by |")] in ([], ["| kind | objects | one record is |"])


@each_page
def test_every_link_leads_to_a_file_and_a_heading_in_it(page: Path) -> None:
    for target, heading in LINK.findall(page.read_text(encoding="utf-8")):
        file = page.parent / target
        assert file.exists(), target
        titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        anchors = ["#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert heading in ["", *anchors], target


def test_what_is_missing_is_found() -> None:
    head = "| what | held by |\n|---|---|\n"
    held = "| a | `tests/test_docs.py::test_what_is_missing_is_found`, `::test_none` |"
    text = f"{head}{held}\n| b | `tests/` |\n| c | d |\n\n| what | what else |\n|---|---|\n| e | f |\n"
    assert unheld_rows(text) == ["| b | `tests/` |", "| c | d |"]
    assert [exists(*one) for one in named_tests(held)] == [True, False]
    assert [exists(*one) for one in named_tests("`tests/jobs/` `tests/none.py` `tests/::x`")] == [True, False, False]
