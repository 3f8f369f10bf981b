"""Which token ids a simulated worker chooses from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from worker.errors import CheckpointError, UnsupportedModel

Int32Array = npt.NDArray[np.int32]


def config_vocab_size(model_dir: Path) -> int:
    """vocab_size of config.json. Raises UnsupportedModel."""
    value = _read_json(model_dir / "config.json").get("vocab_size")
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModel(
            f"{model_dir / 'config.json'}: vocab_size is {value!r}; give a whole number above 0,"
            " or --vocab-size"
        )
    return value


def choose_vocabulary(model_dir: Path, token_text: str, vocab_size: int) -> Int32Array:
    """int32 [n] of the ids that `--token-text` names, all below `vocab_size`.

    "multibyte" holds as many ids whose bytes are not all ASCII as ids of ASCII text, so that
    characters come whole, in pieces and broken. Raises CheckpointError where tokenizer.json is no
    byte-level BPE or has no such ids.
    """
    if token_text in ("any", "clock"):
        return np.arange(vocab_size, dtype=np.int32)
    path = model_dir / "tokenizer.json"
    tokenizer = _read_json(path)
    words = (tokenizer.get("model") or {}).get("vocab")
    if (
        not isinstance(words, dict) or "\u0120" not in words
    ):  # a space, in the alphabet of byte-level BPE
        raise CheckpointError(f"{path}: --token-text {token_text} wants a byte-level BPE")
    special = {token["id"] for token in tokenizer.get("added_tokens", [])}
    ordinary = {w: i for w, i in words.items() if i not in special and i < vocab_size}
    ascii_ids = sorted(i for w, i in ordinary.items() if all(map(_is_ascii_text, w)))
    wide_ids = sorted(i for w, i in ordinary.items() if any(map(_is_high_byte, w)))
    if not ascii_ids or (token_text == "multibyte" and not wide_ids):
        raise CheckpointError(f"{path}: has no ids for --token-text {token_text}")
    if token_text == "ascii":
        return np.array(ascii_ids, np.int32)
    count = max(len(ascii_ids), len(wide_ids))
    return np.concatenate([np.resize(ids, count) for ids in (ascii_ids, wide_ids)]).astype(np.int32)


def _is_ascii_text(char: str) -> bool:
    return " " <= char <= "~" or char == "\u0120"


def _is_high_byte(char: str) -> bool:
    """Whether a character of the byte-level alphabet stands for a byte from 0x80 on.

    The printable Latin-1 characters stand for themselves; of the others in order of their bytes,
    which follow from U+0100 on, 34 are below 0x80.
    """
    return "\u00a1" <= char <= "\u00ff" or "\u0122" <= char <= "\u0143"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: expected a JSON file: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(parsed).__name__}")
    return parsed
