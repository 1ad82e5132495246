"""A long video cut in pieces by time becomes the same documents, to the byte, as the video in one go."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines.cluster.progress import bar
from pipelines.dag.partitions import Pieces
from pipelines.dag.stage import Made
from pipelines.recipe import Recipe
from pipelines.sources.list_sources import list_sources
from pipelines.tokenize.encode_media import vqgan_pool
from pipelines.tokenize.partition import Partitions
from pipelines.tokenize.record import TokenizeRecord
from pipelines.tokenize.records import TokenizeJob
from pipelines.tokenize.run import TokenizePlace, tokenize_by
from pipelines.tokenize.tokenize_task import tokenize
from pipelines.tokenize.video_pieces import cut_video, encode_piece, missing
from pipelines.tokenize.vocabulary import joint_vocabulary
from storage.store import Store
from testing.miniature import VQGAN_SIZES, recipe, sample
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.model import VQGAN, build_vqgan

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, one of them damaged in its second half, and a VQGAN."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "clips").mkdir()
    video = sample("gradio", "media_assets/videos/world.mp4").read_bytes()  # 30 s
    (folder / "clips" / "a.mp4").write_bytes(video)
    damaged = bytearray(video)
    damaged[len(video) * 3 // 5 :][:20_000] = bytes(20_000)
    for place in range(len(video) * 3 // 5, len(video) * 3 // 5 + 20_000):
        damaged[place] ^= 0xFF
    (folder / "clips" / "b.mp4").write_bytes(damaged)
    VQGAN(build_vqgan(VQGANConfig(**VQGAN_SIZES), seed=5)).save(folder / "vqgan" / "weights")
    return folder


def made_of(folder: Path, root: str, **settings: Any) -> Recipe:
    """Both clips twice, once with their last fifth held out."""
    tree = recipe(folder, folder / root)
    clips = {"urls": ["clips/*.mp4"], "fields": ["vision"], "heldout_tail": 0.2}
    tree["sources"] = {"clips": clips, "acts": {"urls": ["clips/*.mp4"], "fields": ["vision"]}}
    tree["text_tokenizer"] = {}
    tree["tokenize"] = {"fps": 4, "chunk_frames": 16, "max_bad_fraction": 0.9, "max_frames": 100, **settings}
    tree["tokenize"]["decode"] = {"workers": 2, "cpus": 0.5}
    return Recipe.model_validate(tree)


def partitions_of(made: Recipe) -> Partitions:
    return Partitions(list_sources(made), 1, {name: {} for name in made.sources})


def tokenized(folder: Path, root: str, **settings: Any) -> tuple[Store, Made[TokenizeRecord]]:
    """The documents and what the stage says of them."""
    made, store = made_of(folder, root, **settings), Store(str(folder / root))
    place = TokenizePlace(store.at("own"), store, store.at("unused"))
    assert made.vqgan is not None
    pool = vqgan_pool(made.vqgan, Store(str(folder / "vqgan")), made.tokenize.encode)
    with pool as encoders, bar("tokenize", None, "part") as line:  # without codes kept, of which one would be another's
        return store, tokenize_by(encoders, None, made, partitions_of(made), {}, place, line)


@pytest.mark.faults
def test_pieces_leave_no_trace_in_the_output(folder: Path) -> None:
    whole, expected = tokenized(folder, "whole")
    cut, manifest = tokenized(folder, "cut", piece_seconds=4)
    assert expected.record.figures.frames > 100
    assert len(expected.quarantine) == 2, "of the damaged one all but the part behind the damage"
    assert cut.names("pieces") == whole.names("unused") == []
    assert cut.names("own") == whole.names("own")
    assert len(whole.names("documents")) == 6
    assert cut.hashes("documents") == whole.hashes("documents")
    assert manifest.record == expected.record
    told = [{(entry["url"], entry["key"]) for entry in found.quarantine} for found in (expected, manifest)]
    assert told[0] == told[1]
    shutil.rmtree(folder / "cut")


@pytest.mark.faults
def test_what_a_dead_run_left_of_a_video_is_not_made_again(folder: Path) -> None:
    made = made_of(folder, "half", piece_seconds=8)
    made = made.model_copy(update={"sources": {"clips": made.sources["clips"].model_copy(update={"heldout_tail": 0})}})
    job = TokenizeJob(made, joint_vocabulary(made), 32)
    store = Store(str(folder / "half"))
    part = next(iter(partitions_of(made).values()))
    pieces = cut_video(part.name, part.objects[0], job)
    assert [len(piece.samples) for piece in pieces] == [27, 26, 27, 20]

    class Pool:
        """Encodes in this process."""

        def __init__(self) -> None:
            self.vqgan = VQGAN.load(folder / "vqgan" / "weights")
            self.encode = self

        def remote(self, boxed: list[Any], media: str) -> Any:
            return ray.put((self.vqgan.encode(ray.get(boxed[0])), "this process"))

    pool = Pool()
    for piece in (pieces[2], pieces[0]):
        encode_piece(piece, job, pool, store)
    assert missing(pieces, store) == [pieces[1], pieces[3]]
    ahead = tokenize(part, job, pool, store)
    assert isinstance(ahead, Pieces)
    assert [piece.name for piece in ahead.pieces] == [pieces[1].name, pieces[3].name]
    for piece in ahead.pieces:
        encode_piece(piece, job, pool, store)
    record = tokenize(part, job, pool, store)
    assert not isinstance(record, Pieces)
    assert record["frames"] == 100
