"""Pieces of text must join to what the tokenizers library decodes at once, for any ids."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer

from coordinator.frontend import text_stream
from coordinator.frontend.detokenizer import IncrementalDetokenizer
from coordinator.frontend.tokenizer import Tokenizer
from tests.unit.coordinator.frontend.small_tokenizers import (
    STREAMING_KINDS,
    byte_fallback,
    byte_level,
)


@functools.cache
def _tokenizer(kind: str) -> Tokenizer:
    return Tokenizer(STREAMING_KINDS[kind](), {})


def _stream(tokenizer: Tokenizer, ids: Sequence[int], skip: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [detokenizer.push([token_id]) for token_id in ids]
    return [*pieces, detokenizer.flush()]


def _bytes(tokenizer: RustTokenizer, raw: bytes) -> list[int]:
    """One byte-level token per byte."""
    chars = {byte: char for char, byte in text_stream.byte_level_alphabet().items()}
    return [_id(tokenizer, chars[byte]) for byte in raw]


def _id(tokenizer: RustTokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


@pytest.mark.parametrize("kind", STREAMING_KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_full_decode_for_any_ids(kind: str, data: st.DataObject) -> None:
    tokenizer = _tokenizer(kind)
    # A few past the vocabulary: a model may have more rows than the tokenizer has tokens.
    any_id = st.integers(0, tokenizer.vocab_size + 2)
    ids = data.draw(st.lists(any_id, max_size=40))
    skip = data.draw(st.booleans())
    assert "".join(_stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@given(text=st.text(max_size=40), skip=st.booleans())
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_pieces_of_real_text_join_to_it(kind: str, text: str, skip: bool) -> None:
    tokenizer = _tokenizer(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(_stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_byte_sequences_of_any_kind_decode_as_the_library_decodes_them(data: st.DataObject) -> None:
    rust = byte_level()
    # Mostly bytes that begin or continue characters, ill-formed in every way.
    hard = st.sampled_from([0x41, 0x80, 0x9F, 0xA0, 0xBF, 0xC2, 0xE0, 0xE2, 0xED, 0xF0, 0xF4, 0xFF])
    ids = _bytes(rust, bytes(data.draw(st.lists(hard | st.integers(0, 255), max_size=30))))
    tokenizer = _tokenizer("byte_level")
    assert "".join(_stream(tokenizer, ids, True)) == tokenizer.decode(ids)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_smollm2_ids_join_to_the_full_decode(smollm2: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, smollm2.vocab_size - 1), max_size=40))
    skip = data.draw(st.booleans())
    assert "".join(_stream(smollm2, ids, skip)) == smollm2.decode(ids, skip)


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(smollm2_dir)


@pytest.mark.parametrize("char", ["é", "世", "😀"])
def test_character_comes_whole_with_its_last_byte(char: str) -> None:
    rust = byte_level()
    ids = _bytes(rust, char.encode())
    assert _stream(Tokenizer(rust, {}), ids, True) == [*[""] * (len(ids) - 1), char, ""]


def test_unfinished_character_is_replaced_at_the_end() -> None:
    rust = byte_level()
    detokenizer = IncrementalDetokenizer(Tokenizer(rust, {}))
    assert detokenizer.push(_bytes(rust, b"a\xe4\xb8")) == "a"
    assert detokenizer.pending
    assert detokenizer.flush() == "\ufffd"
    assert not detokenizer.pending


def test_byte_run_is_held_until_it_ends_because_one_bad_byte_changes_all_of_it() -> None:
    tokenizer = Tokenizer(byte_fallback(), {})
    euro = [3 + byte for byte in "€".encode()]
    a_letter = tokenizer.encode("a", add_special_tokens=False)[-1:]
    assert _stream(tokenizer, [*euro, *a_letter], True) == ["", "", "", "€a", ""]
    assert _stream(tokenizer, [*euro, 3 + 0xFF], True) == ["", "", "", "", "\ufffd" * 4]


def test_leading_space_is_stripped_once() -> None:
    tokenizer = Tokenizer(byte_fallback(), {})
    ids = tokenizer.encode("he he", add_special_tokens=False)
    assert "".join(_stream(tokenizer, ids, True)) == "he he"


def test_special_tokens_show_only_if_wanted() -> None:
    rust = byte_level()
    end = _id(rust, "<|im_end|>")
    assert _stream(Tokenizer(rust, {}), [end], True) == ["", ""]
    assert _stream(Tokenizer(rust, {}), [end], False) == ["<|im_end|>", ""]


def test_a_long_output_feeds_each_token_at_most_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    feed = text_stream.ByteLevelStage.feed

    def counting_feed(self: text_stream.ByteLevelStage, piece: str) -> Sequence[str]:
        nonlocal calls
        calls += 1
        return feed(self, piece)

    monkeypatch.setattr(text_stream.ByteLevelStage, "feed", counting_feed)
    rust = byte_level()
    tokenizer = Tokenizer(rust, {})
    _stream(tokenizer, _bytes(rust, "日本語 ".encode() * 100), True)
    # Bytes of longer characters each time, as they need their neighbours; the space once.
    assert calls == len("日本語".encode()) * 100 + 1


@pytest.mark.parametrize("kind", STREAMING_KINDS)
def test_remembered_texts_are_those_of_a_fresh_tokenizer(kind: str) -> None:
    used = Tokenizer(STREAMING_KINDS[kind](), {})
    ids = [*range(used.vocab_size), *range(used.vocab_size - 1, -1, -1)]
    for skip in (True, False, True, False):
        fresh = Tokenizer(STREAMING_KINDS[kind](), {})
        assert _stream(used, ids, skip) == _stream(fresh, ids, skip)


def test_planted_fault_a_decoder_that_drops_bytes_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken: Callable[..., bytes] = lambda token, bytes_by_char: b""  # noqa: E731
    monkeypatch.setattr(text_stream, "byte_level_bytes", broken)
    tokenizer = Tokenizer(byte_level(), {})
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert "".join(_stream(tokenizer, ids, True)) != tokenizer.decode(ids)
