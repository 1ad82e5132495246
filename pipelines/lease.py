"""One driver per output folder: a lease file with a heartbeat.

A second driver is refused while the first lives. A lease whose heartbeat stopped, or whose process on this host is
gone, is taken over, so that a killed run can be started again at once.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import psutil

from pipelines.storage import Store
from pipelines.urls import reaching
from tokenization.errors import UserError

LEASE = "lease.json"
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0


@contextlib.contextmanager
def lease(store: Store) -> Iterator[None]:
    """Hold the folder for the length of the block.

    Raises UserError when another living driver holds it, or when nothing can be written there.
    """
    me = {
        "owner": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }
    try:
        with reaching(store.path()):
            _acquire(store, me)
    except FileNotFoundError as error:
        raise UserError(f"{store.path()}: no such place ({error}); create the bucket or mend storage.root") from None
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(store, me, stop), name="lease-heartbeat", daemon=True)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()
        if (store.read_json(LEASE) or {}).get("owner") == me["owner"]:
            store.delete(LEASE)


def _acquire(store: Store, me: dict[str, Any]) -> None:
    while True:
        if store.create_json(LEASE, {**me, "beat": time.time()}):
            time.sleep(0.1)  # two drivers may both have removed a dead lease: only one finds its own still here
            if (store.read_json(LEASE) or {}).get("owner") == me["owner"]:
                return
        holder = store.read_json(LEASE)
        if holder is None:
            continue
        if not _is_dead(holder):
            raise UserError(
                f"{store.path()}: another driver (pid {holder['pid']} on {holder['host']}) writes here; wait for it, "
                f"stop it, or give this run its own storage.root"
            )
        store.delete(LEASE)


def _is_dead(holder: dict[str, Any]) -> bool:
    if holder["host"] == socket.gethostname():
        try:
            return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) > 1.0
        except psutil.NoSuchProcess:
            return True
    return bool(time.time() - holder["beat"] > STALE_SECONDS)


def _beat(store: Store, me: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            store.write_json(LEASE, {**me, "beat": time.time()})
