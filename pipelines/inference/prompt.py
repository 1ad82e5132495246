"""What a model is asked, as ids laid out as documents are in training: text and frames in any order. Pure.

A prompt is BOS and its parts one behind the other, each text encoded by itself, as the fields of a document are. Frames
stand between `<vision>` and `</vision>`, which are text. An open span of frames at the end is where frames go on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokenization.field_spec import FieldSpec
from tokenization.fields import build_tokens
from tokenization.text.tokenizer import TextTokenizer
from tokenization.vocabulary import JointVocabulary

Part = str | np.ndarray
"""Text, or codes [n, codes_per_frame] of frames."""

OPENING, CLOSING = "<vision>", "</vision>"
_FRAMES = FieldSpec.parse("vision")


def prompt_ids(parts: Sequence[Part], tokenizer: TextTokenizer, vocabulary: JointVocabulary) -> np.ndarray:
    """Ids int32 [L] of a prompt to be answered in text."""
    pieces = [np.array([vocabulary.bos_id], np.int32)]
    for part in parts:
        if isinstance(part, str):
            pieces.append(tokenizer.encode(part))
        else:
            frames, _ = build_tokens({"vision": part}, _FRAMES, tokenizer, vocabulary, add_bos=False, add_eos=False)
            pieces.append(frames)
    return np.concatenate(pieces).astype(np.int32)


def open_frames(
    parts: Sequence[Part], given: np.ndarray | None, tokenizer: TextTokenizer, vocabulary: JointVocabulary
) -> np.ndarray:
    """Ids int32 [L] up to where the frame after the `given` ones begins, codes [n, codes_per_frame]; None for none."""
    pieces = [prompt_ids(parts, tokenizer, vocabulary), tokenizer.encode(OPENING)]
    for codes in () if given is None else given:
        pieces += [vocabulary["vision"].codes_to_ids(codes), np.array([vocabulary.eof_id])]
    return np.concatenate(pieces).astype(np.int32)
