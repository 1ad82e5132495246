"""A text tokenizer as the files that `transformers.AutoTokenizer` loads, with the ids of our own encoding.

In: the model file of a tokenizer. Out: the bytes of `tokenizer.json` and `tokenizer_config.json`. Of a sentencepiece
model the merges are those of `tokenizer`, ranked by score; transformers' own converter for Llama ranks them by id,
which breaks double spaces. A `tokenizer.json` is copied. The configuration names no class of transformers' own, whose
constructors would build the tokenizer anew, and sets `split_special_tokens`, by which a literal "<s>" in a text is
text.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers, processors

from storage.errors import UserError
from tokenization.text.bpe import SPACE
from tokenization.text.tokenizer import (
    BYTE,
    NORMAL,
    TextTokenizer,
    load_text_tokenizer,
    sentencepiece_bpe,
    sentencepiece_model,
)
from tokenization.text.tokenizer_files import SPECIAL_TOKENS

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = SPECIAL_TOKENS[0]
_OTHER_TOKENS = ("unk_token", "pad_token")
PROBE = (
    "",
    " ",
    "To be,  or not to be:\n\tthat is the question.",
    "<s>a</s> <unk> <pad> <vision>b</vision>",
    f"a{SPACE}b   c{SPACE}",
    "def f(x):\n    return {'x': x[0] + 1}\r\n",
    "\u00e9 e\u0301 \ufb03 \u4e2d\u6587\u3000 \U0001f468\u200d\U0001f469\u200d\U0001f467 \ufeff\x00\x7f\U0010ffff",
)
"""Texts on which loaders of a tokenizer have been seen to differ."""


def tokenizer_files(file: Path, context: int) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json` by name.

    file: of `fetch_tokenizer`. context: of the model, in tokens. Raises UserError where what transformers loads encodes
    one of `PROBE` otherwise than the tokenizer itself.
    """
    ours = load_text_tokenizer(str(file))
    is_json = file.suffix == ".json"
    tokenizer = _without_limits(file) if is_json else _converted(file)
    found = json.loads(tokenizer.to_str())
    tokens = {"bos_token": tokenizer.id_to_token(ours.bos_id), "eos_token": tokenizer.id_to_token(ours.eos_id)}
    config = {
        **_kept_settings(file, tokenizer),
        **({} if is_json else {"unk_token": found["model"]["unk_token"]}),
        **tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],  # a Llama has no use for token types
    }
    files = {TOKENIZER: _json(found), TOKENIZER_CONFIG: _json(config)}
    _check(files, ours, file)
    return files


def _converted(file: Path) -> Tokenizer:
    """A sentencepiece model's merges behind what sentencepiece does to a text first, and BOS before every text."""
    proto = sentencepiece_model(file)
    tokenizer, (bos_id, _), _, _ = sentencepiece_bpe(proto)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    special = [piece.piece for piece in proto.pieces if piece.type not in (NORMAL, BYTE)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    bos = proto.pieces[bos_id].piece
    pair = f"{bos}:0 $A:0 {bos}:1 $B:1"
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos}:0 $A:0", pair, [(bos, bos_id)])
    return tokenizer


def _without_limits(file: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _kept_settings(file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a configuration beside the file says further: tokens of its vocabulary, since others would get ids of codes;
    and the template of a chat.
    """
    beside = file.with_name(TOKENIZER_CONFIG)
    if file.suffix != ".json" or not beside.is_file():
        return {}
    config = json.loads(beside.read_text(encoding="utf-8"))
    named = {key: _content(config.get(key)) for key in _OTHER_TOKENS}
    tokens = {key: name for key, name in named.items() if name and tokenizer.token_to_id(name) is not None}
    template = {"chat_template": config["chat_template"]} if isinstance(config.get("chat_template"), str) else {}
    return {**tokens, **template}


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _check(files: Mapping[str, bytes], ours: TextTokenizer, file: Path) -> None:
    from transformers import PreTrainedTokenizerFast  # a second, which reading files does without

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    if len(theirs) > ours.size:
        raise UserError(
            f"{file}: transformers gives it {len(theirs)} ids, not {ours.size}; name another text tokenizer"
        )
    for text in PROBE:
        if theirs.encode(text, add_special_tokens=False) != ours.encode(text).tolist():
            raise UserError(f"{file}: transformers encodes {text!r} to other ids; name another tokenizer")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
