"""The benchmarks' reports as tables for people; machines read the JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.peers import PEERS
from benchmarks.plan import short

_SHORT = {
    "lwm_ring": "LWM ring",
    "contiguous": "contiguous",
    "zigzag": "zigzag",
    "per_document_zigzag": "per doc.",
    "min_heap": "min-heap",
}


def print_plan(report: dict) -> None:
    """One line a cell, then the claims."""
    balance = Table(
        title="The busiest rank's work over the useful mean; keys a rank receives as a share of S (peers: Ulysses 1)"
    )
    _columns(balance, "mix", "S/P", left=True)
    _columns(balance, "tightest", "chosen", *_SHORT.values())
    speed = Table(title="Modelled efficiency (in brackets: at the peer's best Ulysses degree), and planning in CPU ms")
    _columns(speed, "mix", "S/P", left=True)
    _columns(speed, "tightest", "chosen")
    _columns(speed, "layout/Ulysses/route chosen", left=True)
    _columns(speed, *_SHORT.values(), "ms")
    for cell in report["cells"]:
        at = [cell["mix"], f"{short(cell['context'])}/{cell['ranks']}"]
        systems = cell["systems"]
        balance.add_row(
            *at, *(f"{systems[name]['work_over_mean']:.2f} {systems[name]['keys']:.3f}" for name in _systems())
        )
        speed.add_row(
            *at,
            *(f"{systems[name]['efficiency']:.3f}" for name in ("tightest", "chosen")),
            systems["chosen"]["ways"].partition(",")[0],
            *(f"{systems[p]['efficiency']:.3f} ({systems[p]['efficiency_at_best_ulysses']:.3f})" for p in PEERS),
            f"{cell['planning_ms']:.1f}",
        )
    print_tables(balance, speed, claims_table(report["claims"]))


def print_attention(report: dict) -> None:
    """One line a system, then the claims."""
    table = Table(title="CPU seconds of a rank, forward and backward")
    _columns(table, "system", "layout/Ulysses/route", left=True)
    _columns(table, "slowest", "mean", "slowest/mean", "slowest over ours")
    for name, figures in report["systems"].items():
        table.add_row(
            name,
            figures["way"],
            f"{figures['slowest']:.3f}",
            f"{figures['mean']:.3f}",
            f"{figures['slowest_over_mean']:.3f}",
            f"{figures['slowest_over_ours']:.2f}",
        )
    print_tables(table, claims_table(report["claims"]))


def print_overlap(report: dict) -> None:
    """Wall time of a step with the exchange as it is, and slowed."""
    table = Table(title=f"Median wall seconds of a step, forward and backward ({report['way']})")
    _columns(table, "exchange", left=True)
    _columns(table, "seconds")
    table.add_row("as it is", f"{report['seconds']:.3f}")
    table.add_row(f"slowed by {report['added']:.3f} s in all", f"{report['seconds_slowed']:.3f}")
    print_tables(table, claims_table(report["claims"]))


def _systems() -> Sequence[str]:
    return ("tightest", "chosen", *PEERS)


def _columns(table: Table, *names: str, left: bool = False) -> None:
    for name in names:
        table.add_column(name, justify="left" if left else "right")


def claims_table(claims: Iterable[dict]) -> Table:
    """Targets with what was measured; each says where it is decided."""
    table = Table(title="Targets")
    _columns(table, "target", "decided at", left=True)
    _columns(table, "target", "measured")
    _columns(table, "", left=True)
    for claim in claims:
        met = "met" if claim["met"] else "MISSED"
        table.add_row(claim["claim"], claim["where"], f"{claim['target']:g}", f"{claim['measured']:g}", met)
    return table


def print_tables(*tables: Table) -> None:
    """Print them, wide where there is no terminal."""
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(width=190)
    for table in tables:
        console.print(table)
