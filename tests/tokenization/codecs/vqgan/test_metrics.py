"""PSNR against numbers worked out by hand."""

import numpy as np
import pytest

from tokenization.codecs.vqgan.metrics import psnr


def test_psnr_of_known_errors() -> None:
    black = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black, black + np.uint8(255)) == pytest.approx(0.0)
    assert psnr(black + np.uint8(100), black + np.uint8(110)) == pytest.approx(28.1308, abs=1e-4)  # 20 log10(25.5)


def test_psnr_refuses_what_it_would_get_wrong() -> None:
    frame = np.zeros((4, 4, 3), dtype=np.uint8)
    for other in (frame[:2], frame.astype(np.float32), frame.astype(np.int16)):
        with pytest.raises(ValueError):
            psnr(frame, other)
    with pytest.raises(ValueError):
        psnr(frame[:0], frame[:0])
