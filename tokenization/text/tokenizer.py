"""Text to ids and back: LLaMA-2-style sentencepiece models and Hugging Face `tokenizer.json` files behind one class.

In: a local model file. Out: a `TextTokenizer` whose ids are int32, without BOS or EOS, and to which a literal "<s>" in
the text is text. A sentencepiece BPE model is encoded part by part with compiled merges (`bpe`), to the same ids as by
sentencepiece; a tokenizer.json by `tokenizers`. Everything runs on the calling thread, since the batch calls in which
`tokenizers` starts threads are not used; more cores need more processes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from storage.errors import BadData, UserError
from tokenization.compiled import compiled
from tokenization.text.bpe import SPACE, BytePairs, suits
from tokenization.text.tokenizer_files import MODELS, SPECIAL_TOKENS

MAX_PART_CHARS = 1 << 20  # a longer part is not text, and encoding it would take about 400 bytes per character

NORMAL, CONTROL, BYTE, BPE_MODEL = 1, 3, 6, 2  # sentencepiece's enumerations of pieces and of models


Encode = Callable[[pa.StringArray], tuple[np.ndarray, np.ndarray]]
"""Texts, none of them null, to their ids, int32 [L], and the end of each text's, int64 [n]."""
Merges = list[tuple[str, str]]
USUAL_TOKENS = ("<s>", "</s>")
"""BOS and EOS of a tokenizer.json where no file beside it names others."""


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """Encodes and decodes text with one vocabulary.

    path: of the model file. fingerprint: sha256 (hex) of that file and, where they are not `USUAL_TOKENS`, the names of
    BOS and EOS. bos_id, eos_id: ids that `encode` never emits. It is pickled as its path, from which an actor loads it
    again.
    """

    path: str
    fingerprint: str
    bos_id: int
    eos_id: int
    _tokenizer: Tokenizer
    _encode: Encode

    @cached_property
    def size(self) -> int:
        """One more than the highest id, special and added ones included."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def __reduce__(self) -> tuple[Any, ...]:
        return load_text_tokenizer, (self.path,)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [L]. Raises BadData on a lone surrogate and on a part over `MAX_PART_CHARS`."""
        try:
            column = pa.array([text], pa.utf8())
        except UnicodeEncodeError as error:
            raise BadData(f"the text holds a lone surrogate at character {error.start}") from None
        return self._encode(column)[0]

    def encode_column(self, texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, int32 [L], and the end of each text's, int64 [n], without an object for each.

        texts: valid UTF-8, none of them null. Raises BadData where a part of one is over `MAX_PART_CHARS`.
        """
        return self._encode(texts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids [L] without BOS and EOS, invalid UTF-8 as U+FFFD. Raises ValueError outside the vocabulary."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.size):
            raise ValueError(f"ids {ids.min()}..{ids.max()} outside the text vocabulary of {self.size}")
        kept = ids[(ids != self.bos_id) & (ids != self.eos_id)]
        return self._tokenizer.decode(kept.tolist(), skip_special_tokens=False)


def load_text_tokenizer(path: str = "") -> TextTokenizer:
    """Load a tokenizer from a local file or directory, once per process and file content.

    path: a sentencepiece BPE model (LLaMA-2's `tokenizer.model`), a Hugging Face `tokenizer.json`, or a directory that
    holds either (the sentencepiece model is preferred, as it is the original). A tokenizer.json's BOS and EOS are those
    that the first of `SPECIAL_TOKENS` beside it names, or else `<s>` and `</s>`. The empty path is the 32,000-piece
    model of the mistral-common package. Raises UserError on a missing file or one of another kind.
    """
    file = _model_file(path)
    beside = (file.with_name(name) for name in SPECIAL_TOKENS if file.suffix == ".json")
    special = next((path for path in beside if path.is_file()), None)
    named = _special_tokens(special) if special else USUAL_TOKENS
    digest = hashlib.sha256(file.read_bytes())
    if named != USUAL_TOKENS:
        digest.update(json.dumps(named).encode())
    return _load(path, file, named, digest.hexdigest())


def check_text_tokenizer(path: str = "") -> None:
    """Raise UserError where a tokenizer cannot be loaded, in less time than loading takes. path: as there."""
    file = _model_file(path)
    if file.suffix == ".json":
        load_text_tokenizer(path)
    else:
        sentencepiece_model(file)


@lru_cache(maxsize=8)
def _load(path: str, file: Path, named: tuple[str, str], fingerprint: str) -> TextTokenizer:
    is_json = file.suffix == ".json"
    tokenizer, special, encode = _from_tokenizer_json(file, named) if is_json else _from_sentencepiece(file)
    return TextTokenizer(path, fingerprint, *special, tokenizer, encode)


def _model_file(path: str) -> Path:
    if not path:
        package = importlib.util.find_spec("mistral_common")  # its data only: importing it takes a second
        if package is None or not package.submodule_search_locations:
            raise UserError("no text tokenizer is named: name one, or install mistral-common, which has the default")
        return Path(package.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
    given = Path(path)
    if given.is_dir():
        for name in MODELS:
            if (given / name).is_file():
                return given / name
        raise UserError(f"{path}: the directory holds neither tokenizer.model nor tokenizer.json; name the model file")
    if not given.is_file():
        raise UserError(f"{path}: there is no such text tokenizer; name a local tokenizer.model or tokenizer.json")
    return given


def _from_tokenizer_json(file: Path, named: tuple[str, str]) -> tuple[Tokenizer, tuple[int, int], Encode]:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{file}: not a Hugging Face tokenizer.json ({error})") from None
    tokenizer.encode_special_tokens = True  # "<s>" in the text is text; plain added tokens are still found
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = []
    for key, token in zip(("bos_token", "eos_token"), named):
        found = tokenizer.token_to_id(token)
        if found is None:
            where = SPECIAL_TOKENS[0]
            raise UserError(f"{file}: its vocabulary has no {token}; set {key} in {where} to a token that it has")
        ids.append(found)
    return tokenizer, (ids[0], ids[1]), partial(_encode_whole, tokenizer)


def _special_tokens(file: Path) -> tuple[str, str]:
    """The names of BOS and EOS in a tokenizer_config.json or special_tokens_map.json; the usual where it names none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); fetch the tokenizer again") from None
    tokens = []
    for key, usual in zip(("bos_token", "eos_token"), USUAL_TOKENS):
        token = config.get(key) if isinstance(config, dict) else config
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise UserError(f"{file}: {key} is {json.dumps(token)}; set it to a token of the vocabulary")
        tokens.append(token or usual)
    return tokens[0], tokens[1]


def _from_sentencepiece(file: Path) -> tuple[Tokenizer, tuple[int, int], Encode]:
    tokenizer, special, vocab, merges = sentencepiece_bpe(sentencepiece_model(file))
    return tokenizer, special, _EncodeParts(tokenizer, vocab, merges)


def sentencepiece_bpe(proto: Any) -> tuple[Tokenizer, tuple[int, int], dict[str, int], Merges]:
    """The `tokenizers` BPE with the ids of a sentencepiece BPE model, its BOS and EOS ids, its pieces and its merges.

    The BPE encodes pieces of text whose spaces are `SPACE`, with the first space before them. Sentencepiece merges the
    neighbours with the highest-scored union first, the leftmost of equals. `generate_merges` ranks by score, then by
    the length of the left part, which gives the same order for the equal-scored runs of spaces. Transformers' own
    LlamaTokenizer ranks by id instead (5.23), which breaks every double space.
    """
    from transformers.convert_slow_tokenizer import generate_merges  # imported late: it takes 0.7 s

    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = generate_merges(vocab, scores, skip_tokens=vocab.keys() - scores.keys())
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece  # required, but byte fallback never uses it
    tokenizer = Tokenizer(BPE(vocab, merges, byte_fallback=True, unk_token=unknown))
    strip_prefix = decoders.Strip(" ", 1, 0)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), strip_prefix]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, (proto.trainer_spec.bos_id, proto.trainer_spec.eos_id), vocab, merges


def sentencepiece_model(file: Path) -> Any:
    """The model in a file, of the kind that can be used. Raises UserError on any other file."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:
        raise UserError(f"{file}: not a sentencepiece model ({error})") from None
    _check_supported(file, proto)
    return proto


def _check_supported(file: Path, proto: Any) -> None:
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    kinds = {piece.type for piece in proto.pieces}
    reasons = {
        "not a sentencepiece model": not proto.pieces,
        "not a BPE model": trainer.model_type != BPE_MODEL,
        "without byte fallback it cannot encode every text": not trainer.byte_fallback
        or not suits({piece.piece: 0 for piece in proto.pieces}),
        "its normalizer changes the text": normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces,
        "it does not put a space before the text": not normalizer.add_dummy_prefix
        or trainer.treat_whitespace_as_suffix,
        "it has user-defined pieces, or no BOS or EOS": not kinds <= {NORMAL, 2, CONTROL, BYTE}
        or min(trainer.bos_id, trainer.eos_id) < 0,
    }
    if reason := next((reason for reason, applies in reasons.items() if applies), None):
        raise UserError(f"{file}: {reason}; use a LLaMA-style sentencepiece BPE model, or a tokenizer.json")


def _encode_whole(tokenizer: Tokenizer, texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """Encode each text by `tokenizers`."""
    made = [_ids(tokenizer, text) for text in texts.to_pylist()]
    return np.concatenate([np.zeros(0, np.int32), *made]), np.cumsum([len(ids) for ids in made], dtype=np.int64)


def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)


class _EncodeParts:
    """Encodes texts, with sentencepiece's dummy prefix, by compiled merges, and parts too long for them whole.

    The merges are compiled at the first text, so that loading and decoding do not wait for that.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: Mapping[str, int], merges: Merges) -> None:
        self._tokenizer, self._vocabulary, self._merges = tokenizer, vocabulary, merges

    def __call__(self, texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
        if not len(texts):
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        data, bounds = _utf8(texts)
        if _holds_space_mark(data):
            data, bounds = _utf8(pc.replace_substring(texts, SPACE, " "))
        return self._byte_pairs.encode_utf8(*_prefixed(data, bounds))

    @cached_property
    def _byte_pairs(self) -> BytePairs:
        return BytePairs(self._vocabulary, self._merges, self._encode_long)

    def _encode_long(self, part: str) -> np.ndarray:
        if len(part) > MAX_PART_CHARS:
            raise BadData(f"{len(part)} characters in a row without a word boundary are not a text")
        return _ids(self._tokenizer, part)


def _utf8(texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of texts, uint8, and their bounds in there, int32 [n + 1]: views, which cannot be written to."""
    _, offsets, content = texts.buffers()
    bounds = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(content or b"", np.uint8)[: bounds[-1]]
    data.flags.writeable = bounds.flags.writeable = False  # so that numba compiles for one kind of array
    return data, bounds


@compiled
def _holds_space_mark(data: np.ndarray) -> bool:
    """Whether there is a U+2581 in UTF-8. Without a way out of the loop it compares many bytes at once."""
    n_marks = 0
    for at in range(len(data) - 2):
        n_marks += (data[at] == 0xE2) & (data[at + 1] == 0x96) & (data[at + 2] == 0x81)
    return n_marks > 0


@compiled
def _prefixed(data: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The texts between consecutive bounds of `data`, concatenated, with a space before each that is not empty; and
    where each then ends, int64 [n].
    """
    ends = np.empty(len(bounds) - 1, dtype=np.int64)
    prefixed = np.empty(bounds[-1] - bounds[0] + len(ends), dtype=np.uint8)
    at = 0
    for number in range(len(ends)):
        start, size = bounds[number], bounds[number + 1] - bounds[number]
        if size:
            prefixed[at] = 32
            prefixed[at + 1 : at + 1 + size] = data[start : start + size]
            at += 1 + size
        ends[number] = at
    return prefixed[:at], ends
