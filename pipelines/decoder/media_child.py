"""The decoder process of videos and images: frames out, as raw bytes with their times, or the number of samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from pipelines.decoder.child import Answer, serve
from pipelines.decoder.messages import frame_request
from tokenization.media.frames import media_frames
from tokenization.media.video import count_samples


def _answers(request: dict[str, Any], file: BinaryIO) -> Iterator[Answer]:
    if request["do"] == "count":
        yield ({"is": "count", "count": count_samples(file, request["fps"])},)
        return
    for chunk in media_frames(file, request["kind"], frame_request(request["frames"])):
        yield {"is": "frames", "count": len(chunk), "total": chunk.total}, chunk.times, chunk.frames


if __name__ == "__main__":
    serve(_answers)
