"""`ringworld bench tokenize`: video to codes, part by part and as a whole, beside what one would write by hand.

In: a real 720p clip, looped to any length without encoding it again, on a real S3 server. Out: a report of

    decode     sampled frames a CPU second, 4 a second of video to 256 px, through the door that all stages use, beside
               a plain PyAV loop that decodes every frame and resizes the sampled ones with Pillow.
    encode     frames a CPU second of LWM's full-size VQGAN on one core, beside diffusers' model in a plain fp32 loop.
    pipeline   frames a second of the tokenize stage over S3 objects, beside the bare encoder in as many processes as
               there are cores, which has its frames in memory; both once weights are loaded and processes warm.
    hour       the tokenize stage over one long video with a small VQGAN: what each of its processes holds in memory.

Systems take turns, and the fastest round of each counts.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.frames_alone import decode_figures, encode_figures, write_vqgan
from benchmarks.looped_clip import upload_looped
from benchmarks.machine import machine
from benchmarks.tokenize_stage import bench_cluster, hour_figures, pipeline_figures
from testing.s3_server import object_store
from tokenization.codecs.vqgan.config import VQGANConfig


@dataclass(frozen=True)
class Settings:
    """sizes: of the VQGAN in `encode` and `pipeline`. seconds: of the video in `decode`. encoded: frames in `encode`.
    frames, clips: in `pipeline`, and in how many objects. hour: seconds of the long video. rounds: of each system in
    all but `hour`.
    """

    sizes: VQGANConfig = field(default_factory=VQGANConfig.lwm)
    seconds: int = 60
    encoded: int = 6
    frames: int = 264
    clips: int = 12
    hour: int = 3600
    rounds: int = 3


@dataclass(frozen=True)
class Claim:
    """A target, whether it is a floor or a ceiling, and what was measured."""

    claim: str
    target: float
    measured: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side of the target."""
        return self.measured <= self.target if self.at_most else self.measured >= self.target


def tokenize_report(settings: Settings) -> dict:
    """Measure all of it and say what was found. Raises UserError where the clip or the server is missing."""
    with tempfile.TemporaryDirectory(prefix="ringworld-bench-") as folder, object_store() as store:
        large, small = Path(folder, "large"), Path(folder, "small")
        write_vqgan(large, settings.sizes)
        minute = upload_looped(store, "minute.mp4", settings.seconds)
        decode = decode_figures(minute, store.options, settings.rounds)
        encode = encode_figures(large, settings.encoded, settings.rounds)
        with bench_cluster(store):
            pipeline = pipeline_figures(large, settings.sizes, store, settings.frames, settings.clips, settings.rounds)
            hour = hour_figures(small, store, settings.hour)
    found = {"decode": decode, "encode": encode, "pipeline": pipeline, "hour": hour}
    return {
        "benchmark": "tokenize",
        "settings": asdict(settings),
        "machine": {
            **machine(),
            **{name: version(name) for name in ("av", "ray", "diffusers")},
            "load_average": round(os.getloadavg()[0], 1),
        },
        **found,
        "claims": [asdict(claim) | {"met": claim.met} for claim in claims(found)],
    }


def claims(found: dict[str, Any]) -> list[Claim]:
    """The targets beside what was measured."""
    decode, encode, pipeline, hour = (found[name] for name in ("decode", "encode", "pipeline", "hour"))
    largest = max(gib for part in (pipeline, hour) for gib in part["memory"].values())
    return [
        Claim("pipeline over the bare encoder", 0.90, pipeline["over_bare"]),
        Claim("frames decoded and resized a cpu-second", 60, decode["ringworld"]),
        Claim("full-size VQGAN over plain diffusers in fp32", 2.0, encode["ringworld"] / encode["diffusers"]),
        Claim("GiB resident in any worker", 1.5, largest, at_most=True),
    ]


def print_tokenize(report: dict) -> None:
    """Each system's figures, memory by process, then the targets."""
    table = Table(title="Video to codes")
    for column, justify in (("measured", "left"), ("system", "left"), ("figure", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for part, unit in (("decode", "frames a cpu-second"), ("encode", "frames a cpu-second")):
        for name, figure in report[part].items():
            table.add_row(f"{part}, {unit}", name, f"{figure:g}")
    for name in ("ringworld", "bare"):
        table.add_row("pipeline, frames a second", name, f"{report['pipeline'][name]:g}")
    for part in ("pipeline", "hour"):
        for role, gib in sorted(report[part]["memory"].items()):
            table.add_row(f"{part}, GiB resident at most", role, f"{gib:g}")
    console = Console()
    console.print(table)
    for claim in report["claims"]:
        met = "met" if claim["met"] else "MISSED"
        bound = "at most" if claim["at_most"] else "at least"
        console.print(f"{claim['claim']} {bound} {claim['target']:g}: {claim['measured']:.3g}: {met}", soft_wrap=True)
