"""Trains a stage by one group of workers after another, until its model is exported.

Each group is a Ray Train run of a fixed size. It ends with the stage, on request where a group of another size is to go
on, or because a worker, a node, the network or its controller fails. The next one goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from model import checkpoint
from pipelines.cluster.ray_cluster import own_errors
from pipelines.cluster.same_code import as_driver, check_nodes
from pipelines.cluster.stop_signals import stop_signals
from pipelines.train.group_size import autoscaler_asked, remove_own_placement_groups, wait_for_room
from pipelines.train.job import CHECKPOINTS, TrainJob
from pipelines.train.supervise import Supervisor
from storage.errors import UserError
from storage.retry import STORE_AWAY, retry

log = logging.getLogger("ringworld")

_ANSWER_SECONDS = 60.0  # for the watch to answer
_BIRTH_SECONDS = 300.0  # the first time, when its process has to be started
# `train_in_groups` counts and judges every failure, a node's pre-emption too.
_NO_RETRIES = FailureConfig(  # type: ignore[call-arg]  # ray.train swaps in its second version at import
    max_failures=0, controller_failure_limit=0, max_preemption_failures=0
)


@dataclass
class Interruption:
    """A failure and what followed. step: of the checkpoint that training went on from. workers, seconds: of the group
    that went on, and from the failure to its first step; None where it made none.
    """

    reason: str
    step: int
    failed_at: float
    workers: int | None = None
    seconds: float | None = None


def train_in_groups(job: TrainJob, watch: Any) -> list[Interruption]:
    """Train to the end of the stage. Returns the failures on the way.

    Raises UserError after `train.max_restarts` failures without a checkpoint between them and where the watch is gone,
    and at once what a restart would not mend (BadData, and a UserError that is not transient).
    """
    label, train = f"train-{job.stage.name}", job.recipe.training
    failures, committed = 0, _committed(job)
    interruptions: list[Interruption] = []
    with autoscaler_asked(train):
        for attempt in itertools.count(1):
            size = wait_for_room(train, job.stage)
            _ask(label, watch.begin.remote(attempt), _BIRTH_SECONDS)
            log.info("%s: %d workers start at step %d", label, size, committed)
            failed: Exception | None = None
            with stop_signals.deferred(), Supervisor(job, watch, size) as supervisor:
                try:
                    _fit(job, watch, attempt, size)
                except (TrainingFailedError, RayActorError, UserError) as error:
                    if isinstance(error, UserError) and not error.transient:
                        raise
                    failed, failed_at = error, supervisor.since or time.time()
                    if isinstance(error, RayActorError):  # the controller died
                        remove_own_placement_groups()
            first_step_at = _ask(label, watch.first_report.remote())
            if interruptions and interruptions[-1].seconds is None and first_step_at is not None:
                last = interruptions[-1]
                last.workers, last.seconds = size, round(first_step_at - last.failed_at, 1)
                log.info("%s: recovered %.1f s after the failure", label, last.seconds)
            before, committed = committed, _committed(job)
            if failed is None:
                if _ask(label, watch.finished.remote()):
                    break
                continue
            failures = 1 if committed > before else failures + 1
            reason = supervisor.hang or _reason(failed)
            if failures > train.max_restarts:
                log.debug("%s: the last failure: %s", label, reason, exc_info=failed)
                with contextlib.suppress(RayError, ConnectionError):  # the cluster may be what failed
                    check_nodes()  # other code, of a node that joined meanwhile, may fail in any way
                raise UserError(
                    f"{label}: {reason}; gave up at step {committed} after {failures} failure(s) without a checkpoint "
                    f"between them (train.max_restarts {train.max_restarts}); mend the cause, whose traceback "
                    f"RINGWORLD_LOG=debug shows, and run the same command again to go on from that step"
                ) from failed
            log.warning("%s: %s; going on from step %d", label, reason, committed)
            interruptions.append(Interruption(reason, committed, failed_at))
    return interruptions


def _ask(label: str, answer: ray.ObjectRef, seconds: float = _ANSWER_SECONDS) -> Any:
    """What the watch answers. Raises UserError where it does not."""
    try:
        return ray.get(answer, timeout=seconds)
    except RayError as error:
        raise UserError(
            f"{label}: the actor on the driver's node that watches the workers does not answer ({_first_line(error)}); "
            f"look for the reason in Ray's logs, and run the same command again to go on from the last checkpoint"
        ) from error


def _fit(job: TrainJob, watch: Any, attempt: int, size: int) -> None:
    pool = job.recipe.training.resources
    timeout = int(job.collective_timeout.total_seconds())
    with tempfile.TemporaryDirectory() as scratch, own_errors():
        _Trainer(
            as_driver(_train),
            train_loop_config={"job": job, "watch": watch, "attempt": attempt},
            torch_config=TorchConfig(backend="nccl" if pool.gpus else "gloo", timeout_s=timeout),
            scaling_config=ScalingConfig(num_workers=size, use_gpu=pool.gpus > 0, resources_per_worker=pool.bundle),
            # Ray Train's own bookkeeping; checkpoints are committed by the workers themselves, into the stage's folder.
            run_config=RunConfig(  # type: ignore[call-arg]  # ray.train swaps in its second version at import
                name=f"train-{job.stage.name}",
                storage_path=scratch,
                logging_config=LoggingConfig(log_level="WARNING"),
                failure_config=_NO_RETRIES,
            ),
        ).fit()


def _train(config: dict[str, Any]) -> None:
    """What a worker runs. It alone imports the engine: driver and controller save the seconds that this takes."""
    from pipelines.train.train_loop import train_worker

    train_worker(config)


class _Trainer(TorchTrainer):
    """Without two of Ray Train's helpers, each an actor that takes seconds to start.

    One is for Ray Data, which is not used here. The other, the cleaner, removes the workers where a dashboard, asked
    once a second, knows of no controller of this run; it may ask the dashboard of another Ray on the machine, which
    knows of none. It is not needed either: the driver ends the workers of a dead controller.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave SIGINT to the run's own handler; Ray's aborts the group and ends the process with 1."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # ray.train swaps in its second version
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback | DatasetsCallback)]


def _committed(job: TrainJob) -> int:
    """The last checkpoint's step. Waits for a store that does not answer, without which no group could start."""
    store, failure = job.store.at(CHECKPOINTS), f"train-{job.stage.name}: its checkpoints cannot be listed just now"
    return retry(lambda: checkpoint.latest_committed(store), failure, STORE_AWAY) or 0


def _reason(error: Exception) -> str:
    """The first line of each rank's failure, ranks that fail alike together."""
    if isinstance(error, RayActorError):
        return f"the controller of the group died: {_first_line(error)}"
    ranks_by_reason: dict[str, list[str]] = {}
    for rank, failure in sorted(getattr(error, "worker_failures", {}).items()):
        ranks_by_reason.setdefault(_first_line(failure), []).append(str(rank))
    reasons = [f"rank {', '.join(ranks)}: {why}" for why, ranks in ranks_by_reason.items()]
    return "; ".join(reasons) or _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {text}".removesuffix(": ")
