"""The door to decoder processes. In: where a medium's bytes are. Out: its frames, whatever becomes of a process.

A process is kept for the thread's next medium and replaced when it has died. A death that the data may have brought
about (a crash, too much processor time) is tried once more in a new process and then is `BadData`; so is a lack of
memory, found in a process that no other medium has used. A process that somebody killed says nothing of the data: it is
replaced a few times, then the caller is told by an OSError, which it may retry. No chunk is given twice.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipelines.decoder.limits import DEFAULT_LIMITS, Limits
from pipelines.decoder.process import DecoderDiedError, DecoderProcess, StrainedError
from storage.errors import BadData
from tokenization.media.frame_sampling import FrameRequest
from tokenization.media.frames import MediaKind
from tokenization.media.video import FrameChunk

_KILLS = 4  # of processes in a row, without an answer between them

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Content:
    """Where a medium's bytes are: those at a URL, a window of them (offset, size), or here, `held` already."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)
    window: tuple[int, int] | None = None
    held: bytes | None = None


def decoded_frames(
    content: Content,
    kind: MediaKind | None,
    request: FrameRequest,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[FrameChunk]:
    """Frames as `tokenization.media.frames.media_frames` makes them.

    Raises BadData on what cannot be decoded within the limits; OSError and UserError of opening and reading the content
    as they are; OSError when the process is killed again and again.
    """
    blocks, held = _held(content)
    return _answers(lambda decoder: decoder.frames({**held, "kind": kind}, request, *blocks), limits)


def counted_samples(content: Content, fps: float, limits: Limits = DEFAULT_LIMITS) -> int:
    """Samples of a whole video, by `tokenization.media.video.count_samples`. Raises as `decoded_frames` does."""
    blocks, held = _held(content)
    (count,) = _answers(lambda decoder: iter([decoder.count({**held, "fps": fps}, *blocks)]), limits)
    return count


def _held(content: Content) -> tuple[list[Any], dict[str, Any]]:
    if content.held is None:
        return [], {"url": content.url, "options": content.options, "window": content.window, "held": None}
    return [content.held] if content.held else [], {"held": len(content.held)}


def _answers(ask: Callable[[DecoderProcess], Iterator[Answer]], limits: Limits) -> Iterator[Answer]:
    """What a process answers, each answer once, over as many processes as it takes."""
    given = kills = 0
    died: DecoderDiedError | None = None
    fresh = False
    while True:
        decoder: DecoderProcess | None = None
        try:
            decoder = _take(limits, fresh)
            fresh = decoder.fresh
            for number, answer in enumerate(ask(decoder)):
                if number >= given:
                    given, kills = given + 1, 0
                    yield answer
            return
        except StrainedError as strained:
            if decoder is not None:
                decoder.close()
            if fresh:
                raise BadData(_short_of_memory(strained, limits)) from None
            fresh = True
        except DecoderDiedError as death:
            if not death.by_data:
                kills += 1
                if kills == _KILLS:
                    raise OSError(f"the process that decodes was killed {kills} times ({death})") from None
            elif died is not None:
                raise BadData(_ended(death, limits)) from None
            else:
                died, fresh = death, True
        finally:
            if decoder is not None:
                _give_back(decoder)


def _short_of_memory(strained: StrainedError, limits: Limits) -> str:
    allowed = f"tokenize.decoder_memory_gib allows ({limits.memory / 2**30:g})"
    if strained.reason is None:
        return f"decoding it takes more memory than {allowed}"
    return f"{strained.reason}; it may take more memory than {allowed}"


def _ended(death: DecoderDiedError, limits: Limits) -> str:
    if death.signal == signal.SIGXCPU:
        return (
            f"decoding it stands still for more processor time than tokenize.decoder_cpu_seconds allows "
            f"({limits.cpu_seconds})"
        )
    return f"decoding it makes the decoder crash ({death})"


class _Idle(threading.local):
    """The process that this thread keeps: the kernel ends it with the thread that started it."""

    decoder: DecoderProcess | None = None
    owner = 0  # a process that was forked from the owner has no part in the pipes


_idle = _Idle()


def _take(limits: Limits, fresh: bool) -> DecoderProcess:
    kept, _idle.decoder = _idle.decoder, None
    if kept is not None and _idle.owner == os.getpid():
        if kept.alive and kept.limits == limits and not fresh:
            return kept
        kept.close()
    return DecoderProcess(limits)


def _give_back(decoder: DecoderProcess) -> None:
    if decoder.idle and decoder.alive and _idle.decoder is None:
        _idle.decoder, _idle.owner = decoder, os.getpid()
    else:
        decoder.close()


@atexit.register
def close_idle() -> None:
    """End the process that this thread keeps."""
    kept, _idle.decoder = _idle.decoder, None
    if kept is not None and _idle.owner == os.getpid():
        kept.close()
