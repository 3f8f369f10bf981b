"""Control tokens as plain text beside control tokens that count."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from coordinator.errors import BadRequest
from coordinator.frontend.literal_encoder import LiteralEncoder
from tests.unit.coordinator.frontend.small_tokenizers import byte_level, metaspace

_MASK = "\U00100000"


def _encoder(rust: Tokenizer) -> LiteralEncoder:
    return LiteralEncoder(rust, allowed_ids=frozenset())


def test_without_literals_ids_are_those_of_the_tokenizer() -> None:
    rust = byte_level()
    text = "<|im_start|>user\n\nhello<think> w <|im_end|>"
    assert _encoder(rust).encode(text, {}) == rust.encode(text).ids


def test_literal_is_encoded_together_with_its_neighbours() -> None:
    rust = byte_level()
    ids = _encoder(rust).encode(f"he{_MASK}ll", {_MASK: "<|im_end|>"})
    rust.encode_special_tokens = True
    assert ids == rust.encode("he<|im_end|>ll").ids


def test_matching_flags_of_control_tokens_hold() -> None:
    rust = byte_level()
    rust.add_special_tokens(
        [AddedToken("<|pad|>", special=True, normalized=False, lstrip=True, rstrip=True)]
    )
    text = "he  <|pad|>  he"
    assert _encoder(rust).encode(text, {}) == rust.encode(text).ids
    assert len(rust.encode(text).ids) == 3


def test_prefix_space_is_added_only_where_the_tokenizer_adds_it() -> None:
    rust = metaspace()
    text = "he<s>he"
    assert _encoder(rust).encode(text, {}) == rust.encode(text).ids
    ids = _encoder(rust).encode(f"{_MASK}he", {_MASK: "<s>"})
    rust.encode_special_tokens = True
    assert ids == rust.encode("<s>he").ids


def test_original_tokenizer_is_left_alone() -> None:
    rust = byte_level()
    before = rust.to_str()
    _encoder(rust).encode(_MASK, {_MASK: "<|im_end|>"})
    assert rust.to_str() == before


def test_vocabulary_that_writes_a_control_token_only_as_such_refuses_it() -> None:
    rust = Tokenizer(models.WordLevel(vocab={"<s>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    rust.decoder = decoders.Fuse()
    rust.add_special_tokens(["<s>"])
    with pytest.raises(BadRequest, match="^chat.messages is '<s>'.*cannot write as plain text"):
        _encoder(rust).encode(_MASK, {_MASK: "<s>"})


def test_special_id_that_plain_text_may_give_is_let_through() -> None:
    rust = Tokenizer(models.WordLevel(vocab={"<unk>": 0, "a": 1}, unk_token="<unk>"))
    rust.add_special_tokens(["<unk>"])
    assert LiteralEncoder(rust, frozenset({0})).encode("what", {}) == [0]
