"""Streaming stages, one by one, against the library's decoders."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from coordinator.frontend.text_stream import (
    UnsupportedDecoder,
    byte_fallback_value,
    byte_level_alphabet,
    parse_decoder,
)
from tests.unit.coordinator.frontend.small_tokenizers import regex_replacing, word_piece

_FUSED = [decoders.Fuse()]
_DECODERS = {
    "strip_each": decoders.Strip(" ", 2, 0),
    "strip_fused": decoders.Sequence([*_FUSED, decoders.Strip(" ", 3, 0)]),
    "replace": decoders.Replace("ab", "x"),
    "replace_one_fused": decoders.Sequence([*_FUSED, decoders.Replace("a", "bb")]),
    "byte_fallback": decoders.ByteFallback(),
    "byte_level_stripped": decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
    "metaspace_after_bytes": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
}


def _streamed(decoder: Any, tokens: Sequence[str]) -> str:
    stages = [factory() for factory in parse_decoder(json.loads(decoder.__getstate__()))]
    out: list[str] = []
    for index in range(-1, len(stages)):
        pieces = list(tokens) if index < 0 else list(stages[index].end())
        for stage in stages[index + 1 :]:
            pieces = [text for piece in pieces for text in stage.feed(piece)]
        out += pieces
    return "".join(out)


@pytest.mark.parametrize("name", _DECODERS)
@given(
    tokens=st.lists(
        st.sampled_from(["", " ", "  ", "a", "ab", " a", "▁", "▁▁a", "<0xE2>", "<0x82>", "<0xac>"])
        | st.text("ab ▁é", max_size=4),
        max_size=12,
    )
)
def test_stages_give_what_the_library_gives(name: str, tokens: list[str]) -> None:
    assert _streamed(_DECODERS[name], tokens) == _DECODERS[name].decode(tokens)


def test_byte_level_alphabet_is_the_librarys() -> None:
    decoder = decoders.ByteLevel()
    alphabet = byte_level_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    for char, byte in alphabet.items():
        expected = bytes([byte]).decode("utf-8", errors="replace")
        assert decoder.decode([char]) == expected


@pytest.mark.parametrize(
    ("token", "byte"),
    [
        ("<0x41>", 0x41),
        ("<0xfF>", 0xFF),
        ("<0x+5>", 5),
        ("<0x-5>", None),
        ("<0x 5>", None),
        ("<0x4_>", None),
        ("<0x123>", None),
        ("0x41", None),
        ("", None),
    ],
)
def test_byte_tokens_are_read_as_the_library_reads_them(token: str, byte: int | None) -> None:
    assert byte_fallback_value(token) == byte
    decoded = decoders.ByteFallback().decode([token])
    assert decoded == (token if byte is None else _one_byte_text(byte))


def _one_byte_text(byte: int) -> str:
    return bytes([byte]).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    "decoder",
    [
        word_piece().decoder,
        regex_replacing().decoder,
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Strip(" ", 0, 1),
        decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
    ],
)
def test_decoder_that_cannot_stream_is_refused_by_name(decoder: Any) -> None:
    spec = json.loads(decoder.__getstate__())
    last = spec["decoders"][-1] if spec["type"] == "Sequence" else spec
    with pytest.raises(UnsupportedDecoder, match=last["type"]):
        parse_decoder(spec)
