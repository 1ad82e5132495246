"""Loss weights: one number a token, so that a packed batch has the loss of the same documents as padded rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import UserError
from tokenization.document import Document
from tokenization.packing.loss_weights import Objective, check_objective, loss_weights
from tokenization.packing.pack import pack
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
        check_objective("vision")


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


def padded_loss(made: list[Document], nll: list[np.ndarray], objective: Objective) -> float:
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
    data: st.DataObject, objective: Objective
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
