"""The joint vocabulary: text ids first, vision ids after them."""

from __future__ import annotations

import numpy as np
import pytest

from tokenization.vocabulary import JointVocabulary


def test_lwm_sizes_follow_from_its_codebook() -> None:
    vocabulary = JointVocabulary.for_codebook(32000, 8192)
    assert (vocabulary.vision_size, vocabulary.size) == (8448, 40448)
    assert (vocabulary.eof_id, vocabulary.eov_id) == (32000 + 8192, 32000 + 8193)


def test_codes_and_ids_are_inverse_over_the_whole_codebook() -> None:
    vocabulary = JointVocabulary.for_codebook(512, 2048)
    codes = np.arange(2048).reshape(8, 256)
    ids = vocabulary.codes_to_ids(codes)
    assert ids.dtype == np.int32
    assert ids.min() == 512
    np.testing.assert_array_equal(vocabulary.ids_to_codes(ids), codes)


@pytest.mark.parametrize("code", [-1, 2048, 2049])
def test_a_code_outside_the_codebook_is_refused_rather_than_clamped(code: int) -> None:
    with pytest.raises(ValueError, match="outside the codebook"):
        JointVocabulary.for_codebook(512, 2048).codes_to_ids(np.array([0, code]))


def test_frame_ends_and_text_are_no_codes() -> None:
    vocabulary = JointVocabulary.for_codebook(512, 2048)
    for id_ in (vocabulary.eof_id, vocabulary.eov_id, 511):
        with pytest.raises(ValueError):
            vocabulary.ids_to_codes(np.array([id_]))


def test_every_id_is_text_or_vision_and_frame_ends_are_vision() -> None:
    vocabulary = JointVocabulary.for_codebook(512, 2048)
    vision = vocabulary.is_vision(np.arange(vocabulary.size))
    assert vision.sum() == vocabulary.vision_size
    assert not vision[:512].any()
    assert vision[[vocabulary.eof_id, vocabulary.eov_id]].all()


def test_a_vision_range_without_room_for_the_frame_ends_is_refused() -> None:
    with pytest.raises(ValueError, match="<eof> and <eov>"):
        JointVocabulary(text_size=512, codebook_size=2048, vision_size=2048)
    assert JointVocabulary(text_size=512, codebook_size=0, vision_size=0).size == 512  # text only
