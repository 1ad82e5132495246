"""The joint vocabulary: text ids first, then a range of ids for each further modality, in one table and one head.

LWM has a table and a head for each modality. Ringworld stores an id as the start of its range plus the code, so a
checkpoint is a plain Llama and an id alone tells its modality. With 32,000 text ids and 8,192 codes, text is 0..31,999
and vision 32,000..40,447, of which 40,192 is `<eof>`, 40,193 `<eov>`, and the rest padding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Modality:
    """A named range of `size` ids from `start` on: `n_codes` codes of a codec, one id for each marker, then padding.

    Names are lower-case letters and digits, since objectives join them with hyphens and metrics with underscores.
    Raises ValueError on another name and on a range that is too small for its codes and markers.
    """

    name: str
    start: int
    size: int
    n_codes: int
    markers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch("[a-z][a-z0-9]*", self.name) or self.name == "source":  # metrics by source have that name
            raise ValueError(f"{self.name!r} cannot name a modality: use lower-case letters and digits, not 'source'")
        if self.size < max(1, self.n_codes + len(self.markers)):
            contents = " and ".join([f"{self.n_codes} codes", *(f"<{marker}>" for marker in self.markers)])
            raise ValueError(f"the {self.size} ids of {self.name} have no room for {contents}")

    @property
    def stop(self) -> int:
        """One more than the last id."""
        return self.start + self.size

    def contains(self, ids: Any) -> Any:
        """Where `ids` (array, tensor or int) lie in this range, markers and padding included: bool."""
        return (ids >= self.start) & (ids < self.stop)

    def marker(self, name: str) -> int:
        """The joint id of a marker. Raises ValueError if there is none of this name."""
        return self.start + self.n_codes + self.markers.index(name)

    def codes_to_ids(self, codes: np.ndarray) -> np.ndarray:
        """Codes (any integer dtype and shape) to joint ids, int32. Raises ValueError on a code out of range."""
        if codes.size and (codes.min() < 0 or codes.max() >= self.n_codes):
            raise ValueError(f"code {int(codes.min())}..{int(codes.max())} outside the codebook of {self.n_codes}")
        return (codes + self.start).astype(np.int32)

    def ids_to_codes(self, ids: np.ndarray) -> np.ndarray:
        """Joint ids to codes, int32. Raises ValueError on an id that is no code of this modality."""
        codes = ids.astype(np.int64) - self.start
        if codes.size and (codes.min() < 0 or codes.max() >= self.n_codes):
            raise ValueError(f"ids outside the range of the codes of {self.name}")
        return codes.astype(np.int32)


@dataclass(frozen=True)
class JointVocabulary:
    """The ranges of all modalities, text first, and text's special ids.

    Raises ValueError on ranges that are not contiguous or share a name.
    """

    modalities: tuple[Modality, ...]
    bos_id: int = 1
    eos_id: int = 2

    @classmethod
    def of_text(cls, size: int, **special: int) -> JointVocabulary:
        """A vocabulary of text alone. special: bos_id and eos_id."""
        return cls((Modality("text", 0, size, size),), **special)

    @classmethod
    def for_codebook(
        cls, text_size: int, codebook_size: int, vision_size: int | None = None, **special: int
    ) -> JointVocabulary:
        """Text and the codes of a VQGAN, with `<eof>` (end of a frame) and `<eov>` (end of the vision stream)."""
        return cls.of_text(text_size, **special).extended("vision", codebook_size, ("eof", "eov"), vision_size)

    def extended(
        self, name: str, n_codes: int, markers: tuple[str, ...] = (), size: int | None = None
    ) -> JointVocabulary:
        """This vocabulary with a further range. size: by default a multiple of 256, as in LWM (8,192 codes: 8,448)."""
        size = -(-(n_codes + len(markers)) // 256) * 256 if size is None else size
        return replace(self, modalities=(*self.modalities, Modality(name, self.size, size, n_codes, markers)))

    def __post_init__(self) -> None:
        first, *_ = self.modalities
        if (first.name, first.start) != ("text", 0) or any(a.stop != b.start for a, b in pairwise(self.modalities)):
            raise ValueError("the ranges of a joint vocabulary do not follow each other, text first")
        if len(self.sizes) < len(self.modalities):
            raise ValueError("two ranges of a joint vocabulary have one name")

    def __getitem__(self, name: str) -> Modality:
        return next(one for one in self.modalities if one.name == name)

    def __contains__(self, name: str) -> bool:
        return name in self.sizes

    @property
    def sizes(self) -> dict[str, int]:
        """The number of ids of each modality, in the order of the ranges."""
        return {one.name: one.size for one in self.modalities}

    @property
    def size(self) -> int:
        """The number of all ids: rows of the embedding table and of the output head."""
        return self.modalities[-1].stop

    @property
    def text_size(self) -> int:
        """The number of text ids."""
        return self.modalities[0].size

    @property
    def eof_id(self) -> int:
        """The joint id that ends every frame but the last."""
        return self["vision"].marker("eof")

    @property
    def eov_id(self) -> int:
        """The joint id that ends the last frame of a vision stream."""
        return self["vision"].marker("eov")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> JointVocabulary:
        """The inverse of `to_json`; also reads the earlier format, which has text and vision only.

        Raises KeyError, TypeError or ValueError on anything else.
        """
        special = {name: plain[name] for name in ("bos_id", "eos_id")}
        if "modalities" in plain:
            ranges = (Modality(**{**one, "markers": tuple(one["markers"])}) for one in plain["modalities"])
            return cls(tuple(ranges), **special)
        if not plain["vision_size"]:
            return cls.of_text(plain["text_size"], **special)
        return cls.for_codebook(plain["text_size"], plain["codebook_size"], plain["vision_size"], **special)
