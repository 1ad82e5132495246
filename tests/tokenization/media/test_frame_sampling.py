"""Which samples of a video are taken, by number alone."""

from __future__ import annotations

import numpy as np

from tokenization.media.frame_sampling import Samples, choose_samples, document_frames, uniform_sample


def test_uniform_sample_is_linspace_truncated() -> None:
    assert uniform_sample(10, 4).tolist() == [0, 3, 6, 9]
    assert uniform_sample(9, 4).tolist() == [0, 2, 5, 8]  # 0, 2.67, 5.33, 8
    assert uniform_sample(3, 8).tolist() == [0, 1, 2]
    assert uniform_sample(0, 8).tolist() == []
    assert uniform_sample(10, 3).tolist() == [0, 4, 9], "the first and the last are among them"
    assert uniform_sample(2, 0).tolist() == []


def test_windows_stay_whole_and_are_left_out_evenly() -> None:
    assert choose_samples(23, 12, window=4).numbers.tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 20, 21, 22]
    assert choose_samples(23, 23, window=4).numbers.tolist() == list(range(23))
    assert choose_samples(23, None, window=4).numbers.tolist() == list(range(23))
    assert choose_samples(40, 8, (0.5, 1.0), window=4).numbers.tolist() == [20, 21, 22, 23, 36, 37, 38, 39]
    assert choose_samples(23, 3, window=4).numbers.tolist() == [0, 1, 2], "never more than the largest number"


def test_documents_have_every_frame_once_a_step_apart() -> None:
    assert [frames.tolist() for frames in document_frames(5, 2)] == [[0, 1], [2, 3], [4]]
    assert [frames.tolist() for frames in document_frames(9, 2, step=3)] == [[0, 3], [1, 4], [2, 5], [6], [7], [8]]
    assert [frames.tolist() for frames in document_frames(8, 2, step=3)][3:] == [[6], [7]]
    assert list(document_frames(0, 2, step=3)) == []


def test_pieces_share_samples_out_by_time() -> None:
    cut = Samples(np.array([4, 8, 12, 16, 20]), True).pieces(8)
    assert [(piece.numbers.tolist(), piece.to_end) for piece in cut] == [
        ([4, 8], False),
        ([12, 16], False),
        ([20], True),
    ]
    assert [piece.numbers.tolist() for piece in Samples(np.arange(3), False).pieces(100)] == [[0, 1, 2]]
    assert [len(piece) for piece in Samples(np.arange(0), True).pieces(100)] == [0]


def test_parts_share_a_video_out_exactly() -> None:
    for total in (0, 1, 7, 100):
        first, last = (choose_samples(total, None, part) for part in ((0.0, 0.8), (0.8, 1.0)))
        assert np.concatenate([first.numbers, last.numbers]).tolist() == list(range(total))
        assert last.to_end
    assert choose_samples(100, 4, (0.5, 0.9)).numbers.tolist() == [50, 63, 76, 89]
