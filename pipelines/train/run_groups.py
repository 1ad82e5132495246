"""A train stage by one group of workers after another, until its model is there.

Each group is a Ray Train run of a fixed size. It ends with the stage, or because it is asked to for the sake of another
size, or because a worker, a node, the network or its controller fails. The next one goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.exceptions import RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

from model import checkpoint
from pipelines.cluster.ray_cluster import own_errors
from pipelines.cluster.same_code import as_driver
from pipelines.cluster.stop_signals import stop_signals
from pipelines.train.group_size import ask_autoscaler, own_placement_groups, wait_for_room
from pipelines.train.job import CHECKPOINTS, TrainJob
from pipelines.train.supervise import Supervisor
from storage.errors import UserError
from storage.retry import STORE_AWAY, retry

log = logging.getLogger("ringworld")

_COLLECTIVE_SECONDS = 1800  # of torch's own time-out, behind ours
# What failed, be it a node's pre-emption, is for `train_in_groups` to count and to judge.
_NO_RETRIES = FailureConfig(  # type: ignore[call-arg]  # ray.train swaps in its second version at import
    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
)


@dataclass
class Interruption:
    """A failure and what became of it. step: the one gone on from. workers, seconds: of the group that went on, and
    from the failure to its first step; None where it made none.
    """

    reason: str
    step: int
    failed_at: float
    workers: int | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {"reason": self.reason, "step": self.step, "workers": self.workers, "seconds": self.seconds}


def train_in_groups(job: TrainJob, watch: Any) -> list[Interruption]:
    """Train to the end of the stage. Returns the failures on the way.

    Raises what the last group raised after `train.max_restarts` failures without a checkpoint between them, and at
    once what a restart would not mend (BadData, and a UserError that is not transient).
    """
    label, failures, attempt, committed = f"train-{job.stage.name}", 0, 0, _committed(job)
    interruptions: list[Interruption] = []
    with _room_asked(job):
        while True:
            attempt += 1
            size = wait_for_room(job.recipe.train, job.stage)
            ray.get(watch.begin.remote(attempt))
            log.info("%s: %d workers start at step %d", label, size, committed)
            failed: Exception | None = None
            failed_at = 0.0
            with stop_signals.deferred(), Supervisor(job, watch, size) as supervisor:
                try:
                    _fit(job, watch, attempt, size)
                except TrainingFailedError as error:
                    failed, failed_at = error, supervisor.since or time.time()
                except RayActorError as error:  # the controller died
                    failed, failed_at = error, time.time()
                    _end_workers_left()
                except UserError as error:
                    if not error.transient:
                        raise
                    failed, failed_at = error, time.time()
            first_step_at = ray.get(watch.first_report.remote())
            if interruptions and interruptions[-1].seconds is None and first_step_at is not None:
                last = interruptions[-1]
                last.workers, last.seconds = size, round(first_step_at - last.failed_at, 1)
                log.info("%s: had recovered %.1f s after the failure", label, last.seconds)
            before, committed = committed, _committed(job)
            if failed is None:
                if ray.get(watch.finished.remote()):
                    return interruptions
                continue
            failures = 1 if committed > before else failures + 1
            reason = supervisor.hang or _reason(failed)
            if failures > job.recipe.train.max_restarts:
                log.warning("%s: %s; giving up after %d failures without a checkpoint between", label, reason, failures)
                raise failed
            log.warning("%s: %s; going on from step %d", label, reason, committed)
            interruptions.append(Interruption(reason, committed, failed_at))


def _fit(job: TrainJob, watch: Any, attempt: int, size: int) -> None:
    pool, train = job.recipe.train.resources, job.recipe.train
    with tempfile.TemporaryDirectory() as scratch, own_errors():
        _Trainer(
            as_driver(_train),
            train_loop_config={"job": job, "watch": watch, "attempt": attempt},
            torch_config=TorchConfig(
                backend="nccl" if pool.gpus else "gloo",
                timeout_s=int(max(_COLLECTIVE_SECONDS, 2 * train.hang_seconds)),
            ),
            scaling_config=ScalingConfig(
                num_workers=size,
                use_gpu=pool.gpus > 0,
                resources_per_worker=pool.bundle,
            ),
            # Ray Train's own bookkeeping; checkpoints are committed by the workers themselves, into the stage's folder.
            run_config=RunConfig(  # type: ignore[call-arg]  # ray.train swaps in its second version at import
                name=f"train-{job.stage.name}",
                storage_path=scratch,
                logging_config=LoggingConfig(log_level="WARNING"),
                failure_config=_NO_RETRIES,
            ),
        ).fit()


def _train(config: dict[str, Any]) -> None:
    """What a worker runs. Only it imports the engine: driver and controller would take seconds for it, for nothing."""
    from pipelines.train.train_loop import train_worker

    train_worker(config)


class _Trainer(TorchTrainer):
    """Without two of Ray Train's helpers, each an actor that takes seconds to start.

    One is for Ray Data, which is not used here. The other, the cleaner, asks a dashboard once a second whether this
    run's controller lives, and takes the workers away where the answer is no. It asks whichever dashboard it finds:
    that of another Ray on the machine knows of no such controller. Nor is it needed: should the controller die, its
    workers are ended by the driver.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave SIGINT to the run's own handler; Ray's aborts the group and ends the process with 1."""

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()  # type: ignore[misc]  # ray.train swaps in its second version
        return [one for one in made if not isinstance(one, PlacementGroupCleanerCallback | DatasetsCallback)]


@contextlib.contextmanager
def _room_asked(job: TrainJob) -> Iterator[None]:
    """While a range of workers is trained by, the autoscaler is to bring back nodes that were lost."""
    if job.recipe.train.min_workers is None:
        yield
        return
    ask_autoscaler(job.recipe.train, job.recipe.train.workers)
    try:
        yield
    finally:
        ask_autoscaler(job.recipe.train, 0)


def _end_workers_left() -> None:
    """Remove what a dead controller still holds of the cluster, and with it the workers that nobody watches any more.

    These are the placement groups of this driver, which makes no others.
    """
    for number in own_placement_groups():
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(number))))


def _committed(job: TrainJob) -> int:
    """The last checkpoint's step; a store that is away is waited for: until it is back no group could start."""
    ask = partial(checkpoint.latest_committed, job.store.at(CHECKPOINTS))
    return retry(ask, f"train-{job.stage.name}: its checkpoints cannot be listed just now", STORE_AWAY) or 0


def _reason(error: Exception) -> str:
    """The first line of each rank's failure; of ranks that fail alike, one stands for all."""
    if isinstance(error, RayActorError):
        return f"the controller of the group died: {_first_line(error)}"
    by_reason: dict[str, list[int]] = {}
    for rank, failure in sorted(getattr(error, "worker_failures", {}).items()):
        by_reason.setdefault(_first_line(failure), []).append(rank)
    reasons = [f"rank {', '.join(map(str, ranks))}: {why}" for why, ranks in by_reason.items()]
    return "; ".join(reasons) or _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {text}".removesuffix(": ")
