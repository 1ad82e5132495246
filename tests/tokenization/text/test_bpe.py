"""Compiled byte-pair encoding: the ids of `tokenizers` for every vocabulary that it takes, in bounded memory."""

from __future__ import annotations

import random
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE

from tokenization.text.bpe import SPACE, BytePairs, suits

Merges = list[tuple[str, str]]

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CHARS = st.sampled_from(["a", "b", "\n", "\u00e9", "\u4e00", "\U0001f600"])


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[dict[str, int], Merges]:
    """Some single characters, and merges of what is there already, in any order of rank."""
    pieces = [SPACE, *draw(st.lists(CHARS, min_size=1, max_size=6, unique=True))]
    merges: Merges = []
    for _ in range(draw(st.integers(0, 12))):
        left, right = draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces))
        if (left, right) not in merges and len(left + right) < 12:
            merges.append((left, right))
            pieces += [] if left + right in pieces else [left + right]
    merges = draw(st.permutations(merges))
    return {piece: id_ for id_, piece in enumerate(["<unk>", *BYTES, *pieces])}, merges


class Reference:
    """`tokenizers`, given a whole text; remembers what it was asked."""

    def __init__(self, vocabulary: dict[str, int], merges: Merges) -> None:
        self._tokenizer = Tokenizer(BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
        self.asked: list[str] = []

    def __call__(self, text: str) -> np.ndarray:
        self.asked.append(text)
        return np.array(self._tokenizer.encode(text.replace(" ", SPACE)).ids, dtype=np.int32)


def encode(ours: BytePairs, text: str) -> np.ndarray:
    content = np.frombuffer(text.replace(SPACE, " ").encode(), np.uint8)
    return ours.encode_utf8(content, np.array([len(content)]))[0]


TEXTS = st.text(
    st.sampled_from([" ", "a", "b", "\n", "\u00e9", "\u4e00", "\U0001f600", SPACE, "?", "\x00"]), max_size=60
)


@given(vocabularies(), st.lists(TEXTS, max_size=6), st.sampled_from([4, 7, 256]), st.sampled_from([1, 4, 1 << 10]))
@example(({piece: i for i, piece in enumerate([SPACE, "<unk>", *BYTES, "a"])}, []), [" a", "\x00", "\x00\x00"], 256, 4)
def test_any_vocabulary_gives_the_ids_of_tokenizers(
    vocabulary: tuple[dict[str, int], Merges], texts: list[str], merged_bytes: int, cached_parts: int
) -> None:
    reference = Reference(*vocabulary)
    ours = BytePairs(*vocabulary, reference, merged_bytes=merged_bytes, cached_parts=cached_parts)
    for text in texts:  # by one encoder: what it remembers of one text serves the next
        ids = encode(ours, text)
        assert ids.dtype == np.int32
        assert ids.tolist() == reference(text).tolist()


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_character_becomes_its_bytes_where_it_has_no_piece(text: str) -> None:
    ours = BytePairs({piece: i for i, piece in enumerate([*BYTES, SPACE])}, [], lambda part: pytest.fail(part))
    ids = encode(ours, text)
    assert bytes(np.where(ids == 256, ord(" "), ids).tolist()) == text.replace(SPACE, " ").encode()


@given(
    vocabularies(), st.lists(TEXTS.map(lambda text: text.replace(SPACE, " ")), max_size=8), st.sampled_from([4, 256])
)
def test_texts_that_lie_end_to_end_have_nothing_to_do_with_each_other(
    vocabulary: tuple[dict[str, int], Merges], texts: list[str], merged_bytes: int
) -> None:
    reference = Reference(*vocabulary)
    ours = BytePairs(*vocabulary, reference, merged_bytes=merged_bytes, cached_parts=4)
    contents = [text.encode() for text in texts]
    joined = np.frombuffer(b"".join(contents), np.uint8)
    ids, ends = ours.encode_utf8(joined, np.cumsum([len(content) for content in contents], dtype=np.int64))
    assert len(ends) == len(texts)
    for text, start, end in zip(texts, [0, *ends], ends):
        assert ids[start:end].tolist() == reference(text).tolist()


def test_a_vocabulary_that_cannot_encode_every_text_is_told() -> None:
    complete = {piece: i for i, piece in enumerate([*BYTES, SPACE, "a"])}
    assert suits(complete)
    for absent in ("<0x41>", SPACE):
        rest = {piece: i for piece, i in complete.items() if piece != absent}
        assert not suits(rest)
        with pytest.raises(ValueError, match="each byte"):
            BytePairs(rest, [], lambda part: pytest.fail(part))


LETTERS: tuple[dict[str, int], Merges] = (
    {piece: i for i, piece in enumerate(["<unk>", *BYTES, SPACE, *"abc", "aa", "ab", f"{SPACE}a", "aaaa"])},
    [("a", "a"), ("a", "b"), (SPACE, "a"), ("aa", "aa")],
)


def test_only_what_can_be_cut_nowhere_is_left_to_tokenizers() -> None:
    reference = Reference(*LETTERS)
    ours = BytePairs(*LETTERS, reference)
    text = "cb" * 1000 + " " + "a" * 1000 + "c" * 1000 + " abc"
    ids = encode(ours, text)
    assert reference.asked == [SPACE + "a" * 1000]
    assert ids.tolist() == reference(text).tolist()


def test_an_unbroken_line_of_many_long_parts_takes_time_in_proportion() -> None:
    """A line is never read again from its beginning: ten thousand parts that `tokenizers` has to encode."""
    ours = BytePairs(*LETTERS, lambda part: np.array([len(part)], dtype=np.int32), merged_bytes=8)
    assert encode(ours, ("a" * 9 + "c") * 10_000).tolist() == [9, LETTERS[0]["c"]] * 10_000


def test_memory_beyond_text_and_ids_does_not_grow_with_the_text() -> None:
    rng = random.Random(0)
    ours = BytePairs(*LETTERS, lambda part: pytest.fail(part), cached_parts=1 << 10)
    text = " ".join("".join(rng.choices("abc", k=8)) for _ in range(1 << 17))
    expected = encode(ours, text)
    tracemalloc.start()
    again = encode(ours, text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(text) + 2 * again.nbytes + (1 << 20)
    assert ours.n_cached <= 1 << 10
    assert np.array_equal(again, expected)


def test_threads_that_share_one_get_their_own_ids() -> None:
    rng = random.Random(1)
    texts = [" ".join("".join(rng.choices("abc?", k=6)) for _ in range(2000)) for _ in range(4)]
    ours = BytePairs(*LETTERS, lambda part: pytest.fail(part), cached_parts=64)
    made: dict[int, list[np.ndarray]] = {}
    threads = [
        threading.Thread(target=lambda n=n: made.update({n: [encode(ours, texts[n]) for _ in range(5)]}))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reference = Reference(*LETTERS)
    for n, text in enumerate(texts):
        assert all(np.array_equal(ids, reference(text)) for ids in made[n])
