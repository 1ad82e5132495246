"""What a part of the GPU script is, and what it says: checks, goals, figures and skips, as plain rows.

A part is a function of a `Bench`. A check is a fact: where it does not hold, the part fails, and so does the script. A
goal is a speed: missing it is said and explained by a profile, and fails nothing. A skip has to be one that the part
declared; any other is a failure.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Row = dict[str, Any]
Group = Literal["right", "fast", "long", "many"]


@dataclass(frozen=True)
class Part:
    """One part of the script. run: "module:function", imported in the process that runs it.

    seconds: its limit on a card. packages: without one of them the part is skipped by name. cards: it needs so many.
    skips: what the part may leave out by `Bench.skip`; anything else that it skips is a failure.
    """

    name: str
    group: Group
    about: str
    run: str
    seconds: float
    packages: tuple[str, ...] = ()
    cards: int = 1
    skips: frozenset[str] = frozenset()

    def missing(self, cards: int) -> str | None:
        """Why it cannot run on a machine of so many cards, or None."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if absent:
            return f"not installed: {', '.join(absent)}"
        if cards < self.cards:
            return f"needs {self.cards} cards, here {'is' if cards == 1 else 'are'} {cards}"
        return None

    def function(self) -> Callable[[Bench], None]:
        """What it runs."""
        module, _, name = self.run.partition(":")
        return getattr(importlib.import_module(module), name)


@dataclass
class Bench:
    """What a part is given. device: the card, or the CPU in a rehearsal. tiny: the smallest sizes that do it all.

    until: `time.monotonic()` when the part's time is up; a part does its rows in order of worth and looks at `left`.
    """

    part: Part
    device: torch.device
    tiny: bool
    until: float
    say: Callable[[Row], object]
    failures: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds that the part still has."""
        return self.until - time.monotonic()

    @property
    def on_cuda(self) -> bool:
        """Whether this is a card and no rehearsal."""
        return self.device.type == "cuda"

    def size(self, real: Any, tiny: Any) -> Any:
        """The first, or in a rehearsal the second."""
        return tiny if self.tiny else real

    def check(self, what: str, measured: float, at_most: float = math.inf, at_least: float = -math.inf) -> None:
        """A fact. Every one is looked at before the part fails; NaN never holds."""
        holds = at_least <= measured <= at_most
        self._row("check", what, measured, at_most, at_least, holds=holds)
        if not holds:
            self.failures.append(f"{what}: {measured:.3g}{_limits(at_most, at_least)}")

    def goal(
        self,
        what: str,
        measured: float,
        at_most: float = math.inf,
        at_least: float = -math.inf,
        explain: Callable[[], Row] | None = None,
    ) -> None:
        """A speed to reach. explain: called where it is missed, on a card or not, for the profile and the floor."""
        met = at_least <= measured <= at_most
        self._row("goal", what, measured, at_most, at_least, met=met, **({} if met or explain is None else explain()))

    def figures(self, what: str, **values: Any) -> None:
        """Measured values without a limit."""
        self.say({"kind": "figures", "what": what, **values})

    def skip(self, what: str, why: str) -> None:
        """Leave a piece out. Raises ValueError unless the part declared that it may."""
        if what not in self.part.skips:
            raise ValueError(f"{self.part.name} skips {what!r} ({why}), which is not on its list of allowed skips")
        self.say({"kind": "skipped", "what": what, "why": why})

    def _row(self, kind: str, what: str, measured: float, at_most: float, at_least: float, **rest: Any) -> None:
        limits = {"at_most": at_most, "at_least": at_least}
        finite = {name: limit for name, limit in limits.items() if math.isfinite(limit)}
        self.say(
            {
                "kind": kind,
                "what": what,
                "measured": measured if math.isfinite(measured) else str(measured),
                **finite,
                **rest,
            }
        )


def _limits(at_most: float, at_least: float) -> str:
    limits: Mapping[str, float] = {"at most": at_most, "at least": at_least}
    return "".join(f", {name} {limit:g}" for name, limit in limits.items() if math.isfinite(limit))
