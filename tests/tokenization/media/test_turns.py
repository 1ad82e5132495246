"""The ways in which a frame can lie are eight, with its own."""

from typing import get_args

import numpy as np

from tokenization.media.turns import Turn, turned


def test_every_turn_makes_another_frame_and_none_mixes_frames() -> None:
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    made = [frames, *(turned(frames, turn) for turn in get_args(Turn))]
    assert len({one.tobytes() for one in made}) == 8
    for one in made:
        assert one.flags.c_contiguous
        assert [sorted(frame.ravel().tolist()) for frame in one] == [sorted(frame.ravel().tolist()) for frame in frames]


def test_a_turn_is_what_its_name_says() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, 5, 5, 3), dtype=np.uint8)
    assert (turned(frames, "quarter") == np.rot90(frames, 1, axes=(1, 2))).all()
    assert (turned(frames, "half") == np.rot90(frames, 2, axes=(1, 2))).all()
    assert (turned(frames, "three-quarters") == np.rot90(frames, 3, axes=(1, 2))).all()
    assert (turned(frames, "mirrored") == frames[:, :, ::-1]).all()
    assert (turned(turned(frames, "half"), "transposed") == turned(frames, "antitransposed")).all()
