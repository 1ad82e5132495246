"""From the number of a generated document to its tokens and the spans of them that carry loss. Pure.

In: settings, a number, a tokenizer and, for needles, text. Out: tokens int32 [L], of exactly the length that is drawn
from BOS to EOS, and half-open spans, as `tokenization.document.Document` has them. The same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tokenization.fields import Spans as LossSpans
from tokenization.generated.needles import needle_parts
from tokenization.generated.pieces import Part, pieces_of
from tokenization.generated.settings import KeyValues, Kind, Spans
from tokenization.generated.wording import draw_names, draw_numbers
from tokenization.text.continuation import follow
from tokenization.text.tokenizer import TextTokenizer

_STREAMS = {"spans": 1, "key-values": 2, "needles": 3}
"""What tells the random numbers of the kinds apart."""
_JOINERS = (":", " =", " ->")


def generate(
    settings: Kind, number: int, tokenizer: TextTokenizer, text: np.ndarray | None = None
) -> tuple[np.ndarray, LossSpans]:
    """The document with this number. text: ids int32 [n] in which needles are hidden, repeated where it is short."""
    generator = np.random.Generator(np.random.PCG64([_STREAMS[settings.kind], settings.seed, number]))
    low, high = settings.tokens
    length = min(high, int(np.exp(generator.uniform(np.log(low), np.log(high + 1)))))
    room = length - 2
    if isinstance(settings, Spans):
        parts = list(_spans(settings, generator, room, tokenizer))
    elif isinstance(settings, KeyValues):
        parts = list(_key_values(settings, generator, room, tokenizer))
    else:
        assert text is not None, "needles are hidden in text"
        parts = needle_parts(settings, generator, room, tokenizer, text)
    bos, eos = (np.array([one], np.int32) for one in (tokenizer.bos_id, tokenizer.eos_id))
    return _joined([(bos, False), *parts, (eos, False)])


def _spans(settings: Spans, generator: np.random.Generator, room: int, tokenizer: TextTokenizer) -> Iterator[Part]:
    pieces = pieces_of(tokenizer)
    alphabet = np.concatenate([pieces.digits, pieces.plain[: settings.alphabet]])
    low, high = settings.span
    most = min(high, room // 3)
    length = int(generator.integers(min(low, most), most + 1))
    tokens = np.resize(generator.choice(alphabet, length), room)
    has_loss = generator.random(room) < settings.targets
    has_loss[: length + 1] = False  # of its second time the first token is not known: nothing says how long the span is
    if not has_loss.any():
        has_loss[-1] = True
    for one in np.split(np.arange(room), np.flatnonzero(np.diff(has_loss)) + 1):
        yield tokens[one], bool(has_loss[one[0]])


def _key_values(
    settings: KeyValues, generator: np.random.Generator, room: int, tokenizer: TextTokenizer
) -> Iterator[Part]:
    words = pieces_of(tokenizer).words
    count, most_asked = (int(generator.integers(low, high + 1)) for low, high in (settings.pairs, settings.asked))
    joiner = _JOINERS[int(generator.integers(len(_JOINERS)))]
    heads = [follow(tokenizer, ".", f"\n{key}{joiner}") for key in draw_names(generator, words, count)]
    numbers = draw_numbers(generator, settings.digits, count)
    values = [follow(tokenizer, joiner, f"{number}.") for number in numbers]
    kept = asked = 0
    for head, value in zip(heads, values):
        size = (len(head) + len(value)) * (2 if asked < most_asked else 1)
        if kept and size > room:
            break
        room -= size
        kept, asked = kept + 1, asked + (asked < most_asked)
    for one in generator.permutation(kept).tolist():
        yield np.concatenate([heads[one], values[one]]), False
    for one in generator.permutation(asked).tolist():
        yield heads[one], False
        yield values[one], True
    yield np.resize(follow(tokenizer, ".", "\n"), room), False


def _joined(parts: list[Part]) -> tuple[np.ndarray, LossSpans]:
    """Tokens of all parts, and the spans of those with loss, of which neighbours are one."""
    spans: list[tuple[int, int]] = []
    end = 0
    for ids, has_loss in parts:
        start, end = end, end + len(ids)
        if has_loss and len(ids):
            is_next = spans and spans[-1][1] == start
            spans.append((spans.pop()[0] if is_next else start, end))
    return np.concatenate([ids for ids, _ in parts]).astype(np.int32), tuple(spans)
