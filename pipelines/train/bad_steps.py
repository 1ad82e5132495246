"""What a stage does about steps that would harm the model: a gradient that is not finite, a loss that spikes.

The update of such a step is never made. As the recipe says, training then goes on with the next batch, goes back to the
last checkpoint and on from there with the next batch, so that the batches between are skipped too (as PaLM did, arXiv
2204.02311, section 5.1), or ends. All ranks decide alike, from figures that are the same on every rank, and a
checkpoint has what the decision depends on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from model.training.engine import StepMetrics
from model.training.loss_spikes import SpikeDetector
from pipelines.recipe import BadSteps
from storage.errors import UserError


class BadStepWatch:
    """Judges the steps of a stage, in order."""

    def __init__(self, settings: BadSteps, label: str) -> None:
        self._settings, self._label, self._count = settings, label, 0
        self._spikes: SpikeDetector | None = None
        self.restore({"count": 0, "losses": []})

    @property
    def is_spike(self) -> Callable[[float], bool] | None:
        """For the engine, which drops a step whose loss is a spike; None where the recipe does not look for spikes."""
        return self._spikes

    @property
    def state(self) -> dict[str, Any]:
        """For a checkpoint, plain JSON."""
        return {"count": self._count, "losses": self._spikes.losses if self._spikes else []}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a checkpoint's state, but for the bad steps counted since."""
        self._count = max(self._count, state["count"])
        if self._settings.spike_sigmas is not None:
            self._spikes = SpikeDetector(self._settings.spike_sigmas, self._settings.window, state["losses"])

    def judge(self, metrics: StepMetrics) -> tuple[Literal["good", "skip", "rollback"], str]:
        """What is to follow a step, and the reason where it is bad. Raises UserError where the stage is to end."""
        if math.isfinite(metrics.grad_norm):
            if self._spikes is not None:
                self._spikes.take(metrics.loss)
            return "good", ""
        self._count += 1
        why = self._reason(metrics)
        if self._settings.action == "fail" or self._count > self._settings.at_most:
            counted = f", bad step number {self._count}" if self._count > 1 else ""
            remedy = "look at its batch (ringworld trace), lower lr, or see train.bad_steps"
            raise UserError(f"{self._label}: step {metrics.step}{counted}: {why}; {remedy}")
        return self._settings.action, why

    def _reason(self, metrics: StepMetrics) -> str:
        if self._spikes is not None and self._spikes(metrics.loss):
            return f"the loss {metrics.loss:.4g} spikes above {self._spikes.threshold():.4g}"
        if not math.isfinite(metrics.loss):
            return "the loss is not finite"
        return "the gradient is not finite"
