"""A Ray instance in the test's own process, and a real S3 server: neither is started unless a test asks for it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import s3fs
from miniature import environment

KEY, SECRET = "miniature-access-key", "miniature-secret-key"


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Ray with two CPUs, for calling a pipeline's functions in this process."""
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**27, logging_level="warning")
    yield
    ray.shutdown()


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@dataclass(frozen=True)
class ObjectStore:
    """A running S3 server with a bucket `data`."""

    endpoint: str
    fs: s3fs.S3FileSystem

    @property
    def environment(self) -> dict[str, str]:
        """Where a user's shell keeps credentials."""
        return {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": self.endpoint}


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    folder = tmp_path_factory.mktemp("s3")
    identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "volumes").mkdir()
    server, endpoint, fs = _start(folder)
    try:
        fs.mkdir("data")
        yield ObjectStore(endpoint, fs)
    finally:
        server.kill()
        server.wait()


def _start(folder: Path) -> tuple[subprocess.Popen[bytes], str, s3fs.S3FileSystem]:
    """The server, once it answers; a port taken by another between choosing and binding is chosen anew."""
    for _ in range(3):
        # Each service listens at its port + 10,000 with gRPC too, unless told another.
        master, volume, filer, s3, *grpc = free_ports(8)
        command = [
            str(Path(sys.executable).with_name("weed")),
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
            *(f"-{name}.port.grpc={port}" for name, port in zip(("master", "volume", "filer", "s3"), grpc)),
            "-master.volumeSizeLimitMB=64",
            "-volume.max=50",
        ]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment())
        endpoint = f"http://127.0.0.1:{s3}"
        fs = s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=endpoint, skip_instance_cache=True)
        deadline = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < deadline:
            try:
                fs.ls("", refresh=True)
            except Exception:
                time.sleep(0.2)
            else:
                return server, endpoint, fs
        server.kill()
        server.wait()
    raise RuntimeError((folder / "log").read_text())
