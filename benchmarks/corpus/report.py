"""`ringworld bench corpus`: what a corpus of a million objects takes, part by part, with the targets of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from storage.errors import UserError


def corpus_report(parts: Sequence[str] = ()) -> dict[str, Any]:
    """The reports of the parts named, of all where none is, and all claims. Raises UserError on an unknown part."""
    if unknown := sorted(set(parts) - set(PARTS)):
        raise UserError(f"--parts {unknown[0]}: there is no such part, only {', '.join(PARTS)}")
    made = {name: PARTS[name]() for name in PARTS if name in (parts or PARTS)}
    claims = [claim for report in made.values() for claim in report["claims"]]
    return {"benchmark": "corpus", "claims": claims, "parts": made}


def print_corpus(report: dict[str, Any]) -> None:
    """Each part's rows, then its claims."""
    for name, part in report["parts"].items():
        print(f"{name}:")
        for row in part["rows"]:
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()))
        for claim in part["claims"]:
            verdict = "met" if claim["met"] else "MISSED"
            print(f"  {claim['claim']} {claim['target']:g}: {claim['measured']:g}, {verdict}")


def _planning() -> dict[str, Any]:
    from benchmarks.corpus.planning import planning_report

    return planning_report()


def _driver() -> dict[str, Any]:
    from benchmarks.corpus.driver import driver_report

    return driver_report()


def _growth() -> dict[str, Any]:
    from benchmarks.corpus.growth import growth_report

    return growth_report()


def _text() -> dict[str, Any]:
    from benchmarks.corpus.text import text_figures

    return text_figures()


def _packing() -> dict[str, Any]:
    from benchmarks.corpus.packing import packing_report

    return packing_report()


def _loader_index() -> dict[str, Any]:
    from benchmarks.corpus.loader_index import loader_index_report

    return loader_index_report()


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "planning": _planning,
    "driver": _driver,
    "growth": _growth,
    "text": _text,
    "packing": _packing,
    "loader-index": _loader_index,
}
"""Each imports what it measures with when it runs."""
