"""Streaming forms of the decoders that a tokenizer.json can name.

A decoder of the `tokenizers` library turns a list of tokens into text at once. Here each of its
parts is an incremental machine: a token goes in, the text that no later token can change comes
out, and what a later token could still change is held. So the pieces join to exactly what the
library gives for the whole list, at constant cost per token and without decoding anything twice.

The rejected alternative, decoding a sliding window of ids and sending the difference, is exact
only for decoders whose effect is local, and byte fallback is not: a run of byte tokens is UTF-8
as a whole or replaced as a whole.
"""

import codecs
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

REPLACEMENT = "\ufffd"
# One byte of byte fallback. The library parses the two characters as Rust parses a u8, which
# takes a plus sign.
_BYTE_TOKEN = re.compile(r"<0x(\+[0-9a-fA-F]|[0-9a-fA-F]{2})>")


class UnsupportedDecoder(Exception):
    """The tokenizer's decoder has a part without a streaming form."""


class Stage:
    """One part of a decoder: pieces of text in, pieces of text out."""

    pending = False
    """Whether something that was fed is still held."""
    is_memoryless = False
    """While nothing is held, what a piece gives depends on no piece before it."""

    def feed(self, piece: str) -> Sequence[str]:
        """Takes the next piece; returns what is now certain."""
        raise NotImplementedError

    def end(self) -> Sequence[str]:
        """Returns what was held, as no further piece comes."""
        return ()


StageFactory = Callable[[], Stage]


class ByteLevelStage(Stage):
    """Tokens spelled in the byte-level alphabet -> UTF-8, ill-formed sequences replaced.

    A token with a character outside the alphabet (an added token) stands for its own UTF-8 bytes.
    """

    is_memoryless = True

    def __init__(self, token_bytes: Callable[[str], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, piece: str) -> Sequence[str]:
        text = self._utf8.decode(self._token_bytes(piece))
        self.pending = bool(self._utf8.getstate()[0])
        return (text,)

    def end(self) -> Sequence[str]:
        self.pending = False
        return (self._utf8.decode(b"", final=True),)


class ByteFallbackStage(Stage):
    """Runs of tokens like <0xE2> -> their text, or one replacement character per byte.

    Whether a run is UTF-8 shows only at its end, so the whole run is held until then.
    """

    is_memoryless = True

    def __init__(self) -> None:
        self._run = bytearray()

    def feed(self, piece: str) -> Sequence[str]:
        byte = byte_fallback_value(piece)
        if byte is not None:
            self._run.append(byte)
            self.pending = True
            return ()
        return (*self.end(), piece)

    def end(self) -> Sequence[str]:
        run, self._run, self.pending = self._run, bytearray(), False
        if not run:
            return ()
        try:
            return (run.decode("utf-8"),)
        except UnicodeDecodeError:
            return (REPLACEMENT * len(run),)


class ReplaceStage(Stage):
    """Replaces a string in every piece."""

    is_memoryless = True

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern = pattern
        self._content = content

    def feed(self, piece: str) -> Sequence[str]:
        return (piece.replace(self._pattern, self._content),)


class MetaspaceStage(Stage):
    """Writes the replacement character as a space; in the first token, drops it."""

    def __init__(self, replacement: str, drop_in_first: bool) -> None:
        self._replacement = replacement
        self._space = "" if drop_in_first else " "

    def feed(self, piece: str) -> Sequence[str]:
        text = piece.replace(self._replacement, self._space)
        self._space = " "
        return (text,)


class StripEachStage(Stage):
    """Strips up to `count` leading `content` characters from every piece."""

    is_memoryless = True

    def __init__(self, content: str, count: int) -> None:
        self._content = content
        self._count = count

    def feed(self, piece: str) -> Sequence[str]:
        return (_strip_leading(piece, self._content, self._count),)


class StripOnceStage(Stage):
    """Strips up to `count` leading `content` characters from the text as a whole."""

    def __init__(self, content: str, count: int) -> None:
        self._content = content
        self._left = count

    def feed(self, piece: str) -> Sequence[str]:
        if not self._left or not piece:
            return (piece,)
        rest = _strip_leading(piece, self._content, self._left)
        # The first character that stays ends the stripping.
        self._left = 0 if rest else self._left - len(piece)
        return (rest,)


class JoinStage(Stage):
    """What the library does without a decoder: tokens joined by spaces."""

    def __init__(self) -> None:
        self._separator = ""

    def feed(self, piece: str) -> Sequence[str]:
        text = self._separator + piece
        self._separator = " "
        return (text,)


def byte_level_alphabet() -> dict[str, int]:
    """The character -> byte table of byte-level BPE (GPT-2's `bytes_to_unicode`, inverted).

    Printable Latin-1 bytes stand for themselves, the others for characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(0x100) if byte not in set(printable))
    table.update((chr(0x100 + index), byte) for index, byte in enumerate(others))
    return table


def byte_level_bytes(token: str, bytes_by_char: Mapping[str, int]) -> bytes:
    """The bytes of one byte-level token."""
    try:
        return bytes([bytes_by_char[char] for char in token])
    except KeyError:
        return token.encode("utf-8")


def byte_fallback_value(token: str) -> int | None:
    """The byte that a token like <0xE2> stands for, None for any other token."""
    match = _BYTE_TOKEN.fullmatch(token)
    return int(match[1], 16) if match else None


def parse_decoder(decoder: Mapping[str, Any] | None) -> list[StageFactory]:
    """Turns the `decoder` of a tokenizer.json into factories of stages, in order.

    Raises UnsupportedDecoder naming the part that has no streaming form.
    """
    if decoder is None:
        return [JoinStage]
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    factories: list[StageFactory] = []
    is_fused = False
    for part in parts:
        if part["type"] == "Fuse":
            is_fused = True
            continue
        factories.append(_fused_stage(part) if is_fused else _token_stage(part))
        is_fused = is_fused or part["type"] == "ByteLevel"
    return factories


def _token_stage(part: Mapping[str, Any]) -> StageFactory:
    match part:
        case {"type": "ByteLevel"}:
            # Remembered per tokenizer; as many entries as the vocabulary has tokens at most.
            token_bytes = functools.cache(
                functools.partial(byte_level_bytes, bytes_by_char=byte_level_alphabet())
            )
            return lambda: ByteLevelStage(token_bytes)
        case {"type": "ByteFallback"}:
            return ByteFallbackStage
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if (
            pattern
        ):
            return lambda: ReplaceStage(pattern, content)
        case {"type": "Metaspace", "replacement": str(replacement), "prepend_scheme": scheme}:
            return lambda: MetaspaceStage(replacement, drop_in_first=scheme != "never")
        case {"type": "Strip", "content": str(content), "start": int(count), "stop": 0}:
            return lambda: StripEachStage(content, count)
    raise UnsupportedDecoder(f"decoder part {dict(part)} has no streaming form")


def _fused_stage(part: Mapping[str, Any]) -> StageFactory:
    """A part that the library applies to the joined text, which here arrives in pieces."""
    match part:
        case {"type": "Strip", "content": str(content), "start": int(count), "stop": 0}:
            return lambda: StripOnceStage(content, count)
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if (
            len(pattern) == 1
        ):
            return lambda: ReplaceStage(pattern, content)
    raise UnsupportedDecoder(f"decoder part {dict(part)} after Fuse has no streaming form")


def _strip_leading(text: str, content: str, count: int) -> str:
    return text[:count].lstrip(content) + text[count:]
