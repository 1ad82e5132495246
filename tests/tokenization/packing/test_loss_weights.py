"""Loss weights: one number a token, so that a packed batch has the loss of the same documents as padded rows."""

import hashlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import UserError
from tokenization.document import Document
from tokenization.packing.loss_weights import loss_weights, objective_modalities
from tokenization.packing.pack import pack
from tokenization.shards.shard import write_shard
from tokenization.vocabulary import JointVocabulary

VOCABULARY = JointVocabulary.for_codebook(text_size=50, codebook_size=20)


@st.composite
def documents(draw: st.DrawFn, vision: bool = True, max_length: int = 40) -> list[Document]:
    made = []
    for number in range(draw(st.integers(1, 12))):
        length = draw(st.integers(2, max_length))
        ids = st.integers(0, (VOCABULARY.eov_id if vision else VOCABULARY.text_size - 1))
        tokens = np.array(draw(st.lists(ids, min_size=length, max_size=length)), dtype=np.int32)
        cuts = sorted(draw(st.sets(st.integers(0, length), max_size=6)))
        spans = tuple(zip(cuts[::2], cuts[1::2]))
        made.append(Document(f"d{number}", "test", tokens, spans))
    return made


def one(tokens: list[int], spans: tuple[tuple[int, int], ...]) -> Document:
    return Document("d", "test", np.array(tokens, dtype=np.int32), spans)


def test_text_targets_share_one_equally() -> None:
    weights = loss_weights(one([1, 10, 11, 12, 2], ((2, 5),)), VOCABULARY, "text")
    np.testing.assert_array_equal(weights, np.array([0, 0, 1 / 3, 1 / 3, 1 / 3], dtype=np.float32))


def test_each_modality_shares_a_half_and_frame_ends_are_vision() -> None:
    tokens = [1, 10, 50, 51, VOCABULARY.eof_id, VOCABULARY.eov_id, 11, 2]
    weights = loss_weights(one(tokens, ((1, 8),)), VOCABULARY, "vision-text")
    sixth, eighth = 0.5 / 3, 0.5 / 4
    np.testing.assert_allclose(weights, [0, sixth, eighth, eighth, eighth, eighth, sixth, sixth], rtol=1e-7)


def test_a_text_document_weighs_a_half_under_vision_text() -> None:
    assert loss_weights(one([1, 10, 2], ((1, 3),)), VOCABULARY, "vision-text").tolist() == [0, 0.25, 0.25]


def test_the_first_token_is_no_target_even_inside_a_span() -> None:
    assert loss_weights(one([1, 10, 2], ((0, 3),)), VOCABULARY, "text").tolist() == [0, 0.5, 0.5]


def test_vision_targets_under_text_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match="document d of source test has 1 vision targets"):
        loss_weights(one([1, 55], ((1, 2),)), VOCABULARY, "text")


def test_vision_without_loss_is_allowed_under_text() -> None:
    assert loss_weights(one([1, 55, 3], ((2, 3),)), VOCABULARY, "text").tolist() == [0, 0, 1]


def test_an_unknown_objective_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="'vision-text'"):
        objective_modalities("vision")


@settings(deadline=None)
@given(documents())
def test_weights_of_an_example_sum_to_a_half_for_each_modality_present(made: list[Document]) -> None:
    for document in made:
        weights = loss_weights(document, VOCABULARY, "vision-text")
        target = document.loss_mask[1:]
        vision = document.tokens[1:] >= VOCABULARY.text_size
        present = (target & vision).any() * 0.5 + (target & ~vision).any() * 0.5
        assert weights.sum(dtype=np.float64) == pytest.approx(present, abs=1e-6)
        assert ((weights[1:] > 0) == target).all()
        assert weights[0] == 0


def padded_loss(made: list[Document], nll: list[np.ndarray], objective: str) -> float:
    """The released loss over padded rows: per row and modality, then the mean over rows."""
    width = max(map(len, made))
    rows = np.zeros((len(made), width))
    valid = np.zeros((len(made), width), dtype=bool)
    vision = np.zeros((len(made), width), dtype=bool)
    for row, (document, losses) in enumerate(zip(made, nll)):
        rows[row, : len(document)] = losses
        valid[row, 1 : len(document)] = document.loss_mask[1:]
        vision[row, : len(document)] = document.tokens >= VOCABULARY.text_size

    def mean(mask: np.ndarray) -> float:
        return float(((rows * mask).sum(axis=1) / np.maximum(mask.sum(axis=1), 1e-10)).mean())

    return mean(valid) if objective == "text" else 0.5 * (mean(valid & vision) + mean(valid & ~vision))


@settings(deadline=None)
@given(st.data(), st.sampled_from(["text", "vision-text"]))
def test_packed_and_weighted_loss_equals_the_released_loss_over_padded_rows(
    data: st.DataObject, objective: str
) -> None:
    made = data.draw(documents(vision=objective == "vision-text"))
    rng = np.random.default_rng(0)
    nll = {document.key: rng.exponential(size=len(document)) for document in made}
    packed, n_examples = 0.0, 0
    for sequence in pack(made, 40, VOCABULARY, objective, window=5):
        n_examples += sequence.n_examples
        for part, start in zip(sequence.lineage, sequence.cu_seqlens):
            weights = sequence.loss_weight[start : start + part["length"]]
            packed += float(weights.astype(np.float64) @ nll[part["key"]])
    expected = padded_loss(made, list(nll.values()), objective)
    assert packed / n_examples == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("objective", "weights", "shard", "targets", "examples"),
    [
        (
            "text",
            "b08cb61b818e593576e55d21f51489fd97e62cf0c6173a47f0d5c385b406933c",
            "a30275ff7e82c45fa348e72ba04119739feb7f8904e08ad12b33931da1e8fa33",
            {"text": 470, "vision": 0},
            [4, 5, 2, 3, 2, 2, 2, 2, 2],
        ),
        (
            "vision-text",
            "7bae1b2cd34d90ea596f25ffa30488eaf6e17d9249aa45c78f7885716c263fc6",
            "a043085da907f3a28bd0c908ea517fb354ca99a1ac418ee30adeb498bfe0c42c",
            {"text": 384, "vision": 86},
            [4, 5, 2, 3, 2, 2, 2, 2, 2],
        ),
    ],
)
def test_text_and_vision_are_to_the_bit_what_they_were_when_there_were_no_others(
    objective: str, weights: str, shard: str, targets: dict[str, int], examples: list[int]
) -> None:
    """Weights of documents, and the shard, counts and normaliser that are made of them, by hashes of that time."""
    made = []
    for n in range(24):
        length = 3 + n * 11 % 37
        n_ids = VOCABULARY.text_size if objective == "text" or n % 3 == 0 else VOCABULARY.eov_id + 1
        tokens = ((np.arange(length) * (n + 7) + n * n) % n_ids).astype(np.int32)
        spans = ((1, length),) if n % 2 else ((2, length // 2 + 1), (length // 2 + 2, length))
        made.append(Document(f"d{n}", "test", tokens, spans))
    every = np.concatenate([loss_weights(document, VOCABULARY, objective) for document in made])
    assert hashlib.sha256(every.tobytes()).hexdigest() == weights
    sequences = list(pack(made, 64, VOCABULARY, objective))
    stats = write_shard(io.BytesIO(), sequences, VOCABULARY)
    assert stats.sha256 == shard
    assert stats.targets == targets
    assert [sequence.n_examples for sequence in sequences] == examples


def test_each_of_three_modalities_shares_a_third() -> None:
    vocabulary = VOCABULARY.extended("audio", 50)
    audio = vocabulary["audio"].start
    document = one([1, 10, 50, 51, audio, audio + 49, audio + 3, 2], ((1, 8),))
    weights = loss_weights(document, vocabulary, "audio-vision-text")
    np.testing.assert_allclose(weights, [0, 1 / 6, 1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9, 1 / 6], rtol=1e-7)
    with pytest.raises(UserError, match=r"3 audio targets under the objective 'vision-text': .* 'audio-vision-text'"):
        loss_weights(document, vocabulary, "vision-text")


@pytest.mark.parametrize("objective", ["", "text-vision", "vision-vision-text", "-text"])
def test_an_objective_names_each_modality_once_and_text_last(objective: str) -> None:
    with pytest.raises(UserError, match="unknown objective"):
        objective_modalities(objective)
    assert objective_modalities("audio-vision-text") == ("audio", "vision", "text")
