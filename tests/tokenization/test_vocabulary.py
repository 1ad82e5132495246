"""The joint vocabulary: text ids first, vision ids after them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from tokenization.vocabulary import JointVocabulary


def test_lwm_sizes_follow_from_its_codebook() -> None:
    vocabulary = JointVocabulary.for_codebook(32000, 8192)
    assert (vocabulary["vision"].size, vocabulary.size) == (8448, 40448)
    assert (vocabulary.eof_id, vocabulary.eov_id) == (32000 + 8192, 32000 + 8193)


def test_codes_and_ids_are_inverse_over_the_whole_codebook() -> None:
    vocabulary = JointVocabulary.for_codebook(512, 2048)
    codes = np.arange(2048).reshape(8, 256)
    ids = vocabulary["vision"].codes_to_ids(codes)
    assert ids.dtype == np.int32
    assert ids.min() == 512
    np.testing.assert_array_equal(vocabulary["vision"].ids_to_codes(ids), codes)


@pytest.mark.parametrize("code", [-1, 2048, 2049])
def test_a_code_outside_the_codebook_is_refused_rather_than_clamped(code: int) -> None:
    with pytest.raises(ValueError, match="outside the codebook"):
        JointVocabulary.for_codebook(512, 2048)["vision"].codes_to_ids(np.array([0, code]))


def test_frame_ends_and_text_are_no_codes() -> None:
    vocabulary = JointVocabulary.for_codebook(512, 2048)
    for id_ in (vocabulary.eof_id, vocabulary.eov_id, 511):
        with pytest.raises(ValueError):
            vocabulary["vision"].ids_to_codes(np.array([id_]))


def test_every_id_is_text_or_vision_and_frame_ends_are_vision() -> None:
    vocabulary = JointVocabulary.for_codebook(512, 2048)
    vision = vocabulary["vision"].contains(np.arange(vocabulary.size))
    assert vision.sum() == vocabulary["vision"].size
    assert not vision[:512].any()
    assert vision[[vocabulary.eof_id, vocabulary.eov_id]].all()


def test_a_vision_range_without_room_for_the_frame_ends_is_refused() -> None:
    with pytest.raises(ValueError, match="<eof> and <eov>"):
        JointVocabulary.for_codebook(text_size=512, codebook_size=2048, vision_size=2048)
    assert JointVocabulary.of_text(512).size == 512


def three_ranges() -> JointVocabulary:
    return JointVocabulary.for_codebook(512, 64, bos_id=0).extended("audio", 50, ("end",), 60)


def test_a_third_range_follows_the_second_with_codes_and_markers_of_its_own() -> None:
    vocabulary = three_ranges()
    audio = vocabulary["audio"]
    assert vocabulary.sizes == {"text": 512, "vision": 256, "audio": 60}
    assert (audio.start, audio.stop, vocabulary.size) == (768, 828, 828)
    assert audio.marker("end") == 768 + 50
    np.testing.assert_array_equal(audio.ids_to_codes(audio.codes_to_ids(np.arange(50))), np.arange(50))
    ranges = np.array([one.contains(np.arange(vocabulary.size)) for one in vocabulary.modalities])
    assert (ranges.sum(0) == 1).all(), "every id is of one modality"
    assert "audio" in vocabulary
    assert "audio" not in JointVocabulary.of_text(512)


def test_a_vocabulary_survives_json() -> None:
    for vocabulary in (JointVocabulary.of_text(512, eos_id=7), three_ranges()):
        assert JointVocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))) == vocabulary


def test_a_vocabulary_of_when_there_were_text_and_vision_alone_is_read() -> None:
    plain = {"text_size": 512, "codebook_size": 64, "vision_size": 256, "bos_id": 0, "eos_id": 3}
    assert JointVocabulary.from_json(plain) == JointVocabulary.for_codebook(512, 64, bos_id=0, eos_id=3)
    text = {**plain, "codebook_size": 0, "vision_size": 0}
    assert JointVocabulary.from_json(text) == JointVocabulary.of_text(512, bos_id=0, eos_id=3)


def test_ranges_that_overlap_or_share_a_name_are_refused() -> None:
    text, vision = JointVocabulary.for_codebook(512, 64).modalities
    for ranges in ((vision,), (text, replace(vision, start=500)), (text, vision, replace(vision, start=768))):
        with pytest.raises(ValueError, match="joint vocabulary"):
            JointVocabulary(ranges)
    for name in ("Audio", "audio-2", "source", ""):
        with pytest.raises(ValueError, match="cannot name a modality"):
            replace(vision, name=name)
