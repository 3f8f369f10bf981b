"""Encoding against transformers, files that are missing or wrong."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from coordinator.errors import BadCheckpoint, TextUnavailable
from coordinator.frontend.tokenizer import Tokenizer
from tests.unit.coordinator.frontend.small_tokenizers import (
    STREAMING_KINDS,
    byte_fallback,
    byte_level,
    metaspace,
    word_piece,
    write_checkpoint,
)

_TEXTS = (
    "hello world",
    " he  is\n\n the user ",
    "naïve 日本 <think>",
    "a<|im_end|>b <s> c",
    "emoji 😀 ∀",
    "",
)
_BOS_EOS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_CONFIGS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "byte level": ("byte_level", {"eos_token": "<|im_end|>"}),
    "post-processor's BOS": ("byte_fallback", _BOS_EOS),
    "config's word on BOS does not count": (
        "byte_fallback",
        {**_BOS_EOS, "add_bos_token": False, "add_eos_token": True},
    ),
    "metaspace": ("metaspace_first", {**_BOS_EOS, "pad_token": "<|pad|>"}),
    "token declared only in config": (
        "metaspace_first",
        {
            **_BOS_EOS,
            "added_tokens_decoder": {
                "0": {"content": "<unk>", "special": True},
                "1": {"content": "<s>", "special": True},
                "2": {"content": "</s>", "special": True},
                "40": {"content": "<|extra|>", "special": False, "normalized": False},
            },
        },
    ),
}


@pytest.mark.parametrize("name", _CONFIGS)
def test_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    kind, config = _CONFIGS[name]
    model_dir = write_checkpoint(tmp_path, STREAMING_KINDS[kind](), config)
    ours, theirs = Tokenizer.from_dir(model_dir), AutoTokenizer.from_pretrained(model_dir)
    for text in (*_TEXTS, "x <|extra|> y"):
        assert ours.encode(text) == theirs(text)["input_ids"], text
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_smollm2_ids_are_those_of_transformers(smollm2_dir: Path) -> None:
    # AutoTokenizer rebuilds the tokenizer by its class and loses tokenizer.json's pre-tokenizer.
    from transformers import PreTrainedTokenizerFast

    ours, theirs = (
        Tokenizer.from_dir(smollm2_dir),
        PreTrainedTokenizerFast.from_pretrained(smollm2_dir),
    )
    for text in (*_TEXTS, "def f(x):\n    return x ** 2  # 12345", "Größe: 3½ µm"):
        assert ours.encode(text) == theirs(text)["input_ids"]


def test_rendered_chat_that_begins_with_bos_gets_no_second_one() -> None:
    tokenizer = Tokenizer(byte_fallback(), {"bos_token": "<s>"})
    once = tokenizer.encode("<s>[INST] hello")
    assert once == tokenizer.encode("<s>[INST] hello", add_special_tokens=False)
    assert once[0] == 1 and 1 not in once[1:]
    assert tokenizer.encode("hello")[0] == 1


def test_bos_that_the_author_wrote_twice_stays_twice() -> None:
    tokenizer = Tokenizer(byte_level(), {"bos_token": "<|im_start|>"})
    bos = tokenizer.encode("<|im_start|>")
    assert tokenizer.encode("<|im_start|><|im_start|>") == bos * 2


def test_eos_named_in_config_is_special_though_tokenizer_json_does_not_say_so(
    tmp_path: Path,
) -> None:
    rust = metaspace()
    rust.add_tokens([AddedToken("<|eot|>", special=False, normalized=False)])
    tokenizer = Tokenizer.from_dir(write_checkpoint(tmp_path, rust, {"eos_token": "<|eot|>"}))
    (eot,) = tokenizer.encode("<|eot|>")
    assert tokenizer.is_special(eot)
    assert tokenizer.decode([eot]) == ""


def test_padding_token_that_nobody_trained_gets_no_id(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(write_checkpoint(tmp_path, metaspace(), {"pad_token": "[PAD]"}))
    assert tokenizer.vocab_size == metaspace().get_vocab_size()


def test_special_tokens_map_counts_where_config_declares_no_tokens(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, metaspace())
    named = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    assert Tokenizer.from_dir(tmp_path).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_truncation_in_tokenizer_json_is_not_applied() -> None:
    rust = byte_level()
    rust.enable_truncation(2)
    rust.enable_padding(length=50)
    assert len(Tokenizer(rust, {}).encode("a b c d e")) == 9


def test_folder_without_tokenizer_json_is_refused_as_text_unavailable(tmp_path: Path) -> None:
    with pytest.raises(TextUnavailable, match="token ids only"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("tokenizer.json", "{", "cannot read it"),
        ("tokenizer_config.json", "{", "cannot be read as JSON"),
        ("tokenizer_config.json", "[]", "holds a list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": {}}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}', "added_tokens_decoder"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"99": {"content": "<s>"}}}',
            "the id 99",
        ),
    ],
)
def test_broken_file_is_named(file: str, content: str, problem: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, metaspace())
    (tmp_path / file).write_text(content)
    with pytest.raises(BadCheckpoint, match=problem) as caught:
        Tokenizer.from_dir(tmp_path)
    assert caught.value.file == tmp_path / file


def test_word_piece_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="WordPiece"):
        Tokenizer.from_dir(write_checkpoint(tmp_path, word_piece()))


@pytest.mark.parametrize("kind", STREAMING_KINDS)
def test_tokens_are_spelled_as_in_the_vocabulary(kind: str) -> None:
    rust = STREAMING_KINDS[kind]()
    tokenizer = Tokenizer(rust, {})
    for token_id in range(-1, tokenizer.vocab_size + 2):
        assert tokenizer.token(token_id) == (rust.id_to_token(token_id) if token_id >= 0 else None)
    longest = max(len(token) for token in rust.get_vocab())
    assert tokenizer.longest_token_chars == longest


def test_token_bytes_are_what_the_token_stands_for() -> None:
    rust = byte_level()
    tokenizer = Tokenizer(rust, {})
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("é 日本 <think>"))) == (
        "é 日本 <think>".encode()
    )
    assert tokenizer.token_bytes(10**6) == b""
    sentencepiece = Tokenizer(byte_fallback(), {})
    assert sentencepiece.token_bytes(3 + 0xE2) == b"\xe2"
    assert sentencepiece.token_bytes(sentencepiece.encode("he")[1]) == b" h"
