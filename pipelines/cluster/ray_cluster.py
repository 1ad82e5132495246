"""Starts a Ray instance for the run, or joins the cluster at an address; ends only what it started."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private import utils
from ray.exceptions import RayError
from ray.job_config import JobConfig

from pipelines.cluster.capacity import Capacity
from pipelines.cluster.same_code import check_nodes
from pipelines.cluster.stop_signals import stop_signals
from pipelines.dag.code_versions import code_place
from storage.errors import BadData, UserError

log = logging.getLogger("ringworld")

_OBJECT_STORE_BYTES = 512 * 2**20  # chunks of frames in flight are small; the default would take 30% of the memory
_TMPDIR_BYTES = 75  # a socket has a path of 107 bytes at most, and Python names one of 32 for Ray's dashboard


@contextlib.contextmanager
def ray_instance(address: str | None, need: Capacity) -> Iterator[None]:
    """Ray for the length of the block: the cluster at `address`, or an instance of its own that offers at least `need`.

    CPUs and custom resources are only numbers to Ray, so that instance has as many as the recipe asks for on any
    machine. Raises UserError when nothing answers at the address, when a node has other code than this process, or when
    there are fewer GPUs here than needed.
    """
    if ray.is_initialized():
        yield
        return
    # Read when ray is imported in the workers: a dead training worker is noticed in 1 s instead of 2.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process whose answers are not used here
    if address and not _answers(address):
        raise _no_cluster(address)
    arguments: dict[str, Any] = {"address": address or "local", "logging_level": logging.WARNING}
    if not arguments["address"].startswith("ray://"):
        arguments["job_config"] = _OurCode()
    if not address:
        if len(os.fsencode(tempfile.gettempdir())) > _TMPDIR_BYTES:
            raise _no_sockets("its path is too long")
        cpus = max(os.cpu_count() or 1, math.ceil(need.cpus))
        arguments |= {"num_cpus": cpus, "resources": need.custom, "include_dashboard": True}
        arguments["object_store_memory"] = _OBJECT_STORE_BYTES
    try:
        with _own_signal_handlers():
            context = ray.init(**arguments)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address:
            raise _no_cluster(address) from error
        raise
    except OSError as error:  # of its session's folder, whose path is too long for sockets, or which cannot be made
        if address:
            raise
        raise _no_sockets(" ".join(str(error).split())) from error
    gpus = ray.cluster_resources().get("GPU", 0)
    if not address and gpus < need.gpus:
        ray.shutdown()
        raise UserError(
            f"the recipe asks for {need.gpus:g} GPUs at once and this machine has {gpus:g}; set RAY_ADDRESS to a "
            f"cluster that has them, or lower the gpus and workers of tokenize.encode, train and evaluate"
        )
    log.info("ray %s, dashboard http://%s", f"joined at {address}" if address else "started", context.dashboard_url)
    try:
        if address:
            check_nodes()
        yield
    except (UserError, BadData):
        raise
    except Exception:
        with contextlib.suppress(RayError, ConnectionError):  # the cluster may be what failed
            check_nodes()  # other code, of a node that joined meanwhile, may fail in any way
        raise
    finally:
        with stop_signals.held_back():
            ray.shutdown()
            stop_signals.install()  # Ray leaves those of the system, which would end the process with its lease held


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Undo what `ray.init` sets for SIGTERM: a handler in Python that exits with 1, one in C++ that prints stacks."""
    rays = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = rays
        stop_signals.install()


class _OurCode(JobConfig):
    """Has workers look for our code where the driver found it.

    Ray has them look in the driver's working directory first, where another checkout may be, or a `model.py`.
    """

    def __init__(self) -> None:
        super().__init__()
        place = code_place()
        if Path(place).name not in ("site-packages", "dist-packages"):  # there every worker looks by itself
            self._py_driver_sys_path = [place]

    def _runtime_env_has_working_dir(self) -> bool:
        return True  # which is what keeps Ray from adding the working directory and the script's


def _answers(address: str) -> bool:
    """Whether anything listens at `[ray://]host:port`, where Ray itself would try for minutes. Other forms pass."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError:
        return False
    return True


def _no_sockets(reason: str) -> UserError:
    return UserError(
        f"TMPDIR={tempfile.gettempdir()}: Ray cannot have its files and sockets there ({reason}); set TMPDIR to a "
        f"folder with a path of 40 characters at most that can be written to, such as /tmp"
    )


def _no_cluster(address: str) -> UserError:
    return UserError(f"RAY_ADDRESS={address}: no Ray cluster answers there; start it or unset it")


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Let a UserError or BadData raised in a Ray task or training worker surface as itself, without Ray around it."""
    try:
        yield
    except Exception as error:
        # Ray's error of a task has one cause, that of a group of training workers one a worker. That type is not named
        # here: it would take a second to import, in every worker of every stage.
        for cause in [getattr(error, "cause", None), *getattr(error, "worker_failures", {}).values()]:
            while cause is not None:
                if isinstance(cause, UserError | BadData):
                    raise cause from None
                cause = getattr(cause, "cause", None) or cause.__cause__
        raise
