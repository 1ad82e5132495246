"""Pictures with what frames have and noise has not: shaded grounds, edges, stripes, grain."""

from __future__ import annotations

import numpy as np

SHAPES = 9
GRAIN = 4.0
"""Standard deviation of the grain, of 255."""


def pictures(count: int, size: int, seed: int) -> np.ndarray:
    """uint8 [count, size, size, 3]: discs, boxes and striped boxes over a ground that shades from colour to colour."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    return np.stack([_picture(x, y, generator) for _ in range(count)])


def _picture(x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    first, second = generator.uniform(0, 255, (2, 3))
    picture = first + (second - first) * _along(x, y, generator)[..., None]
    for number in range(SHAPES):
        a, b, wide, high = generator.uniform((0, 0, 0.05, 0.05), (1, 1, 0.3, 0.3))
        inside = (abs(x - a) < wide) & (abs(y - b) < high)
        if number % 3 == 0:
            inside = ((x - a) / wide) ** 2 + ((y - b) / high) ** 2 < 1
        if number % 3 == 1:
            inside &= np.sin(_along(x, y, generator) * generator.uniform(20, 200)) > 0
        picture[inside] = generator.uniform(0, 255, 3)
    return np.clip(picture + generator.normal(0, GRAIN, picture.shape), 0, 255).astype(np.uint8)


def _along(x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """How far each pixel lies in a drawn direction, 0 to 1 about."""
    angle = generator.uniform(0, np.pi / 2)
    return (x * np.cos(angle) + y * np.sin(angle)) / (np.cos(angle) + np.sin(angle))
