"""A small exported model with a codec, made once for all tests of its files."""

from __future__ import annotations

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.export.trained import find_trained
from pipelines.export.write import export_model
from pipelines.inference.loaded import LoadedModel, load
from storage.store import Store
from testing.committed_run import commit_run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("inference")
    recipe, _ = commit_run(made / "tiny")
    export_model(find_trained(recipe.storage.root), Store(str(made / "model")))
    return str(made / "model")


@pytest.fixture(scope="session")
def model(folder: str) -> LoadedModel:
    return load(folder, device="cpu")


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("media") / "a picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> str:
    """16 frames, two seconds, each of a grey of its own."""
    path = tmp_path_factory.mktemp("media") / "film.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(16):
            frame = np.full((32, 32, 3), number * 16, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return str(path)
