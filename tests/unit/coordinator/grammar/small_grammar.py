"""A checkpoint folder for which constraints can be compiled, and what masks allow."""

import json
from pathlib import Path

import numpy as np
from llguidance import LLTokenizer

from protos.lockstep.v1 import worker_pb2
from tests.helpers.fake_tables import allowed_ids
from tests.unit.coordinator.frontend.small_tokenizers import byte_level, write_checkpoint

EOS = 269  # <|end_of_text|>
VOCAB_SIZE = 300  # some rows more than the tokenizer has tokens


def write_model(folder: Path) -> Path:
    """With a byte-level tokenizer, without weights."""
    write_checkpoint(folder, byte_level())
    config = {"vocab_size": VOCAB_SIZE, "eos_token_id": EOS, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def read_tokenizer(folder: Path) -> LLTokenizer:
    return LLTokenizer(str(folder / "tokenizer.json"), eos_token=[EOS])


def allowed_texts(tokenizer: LLTokenizer, mask: worker_pb2.SlotMask) -> set[str]:
    """The tokens that a mask allows, "EOS" for the end."""
    return {
        "EOS" if token_id == EOS else tokenizer.decode_str([token_id])
        for token_id in allowed_ids(mask)
    }


def packed(*token_ids: int) -> bytes:
    return np.array(token_ids, "<i4").tobytes()
