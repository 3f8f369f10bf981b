"""Text <-> token ids, with the `tokenizers` library and the files beside the checkpoint."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer

from coordinator.errors import BadCheckpoint, TextUnavailable
from coordinator.frontend.control_token_mask import ControlTokenMask
from coordinator.frontend.literal_encoder import LiteralEncoder
from coordinator.frontend.special_tokens import apply_special_tokens, load_special_tokens
from coordinator.frontend.text_stream import (
    Stage,
    UnsupportedDecoder,
    byte_fallback_value,
    byte_level_alphabet,
    byte_level_bytes,
    parse_decoder,
)


class Tokenizer:
    """A checkpoint's tokenizer. Never changes once made; any thread may use it."""

    def __init__(self, rust: RustTokenizer, special_tokens: Mapping[str, str]) -> None:
        """Takes over `rust`; `special_tokens` maps names ("bos_token", ...) to texts.

        Raises UnsupportedDecoder if ids cannot be turned into text piece by piece.
        """
        rust.no_truncation()
        rust.no_padding()
        self._rust = rust
        self.special_tokens = dict(special_tokens)
        decoder = json.loads(rust.decoder.__getstate__()) if rust.decoder is not None else None
        self._stage_factories = parse_decoder(decoder)
        self._is_byte_level = decoder is not None and "ByteLevel" in json.dumps(decoder)
        self._tokens = _tokens_by_id(rust)
        self._settled_texts: dict[bool, dict[int, str]] = {False: {}, True: {}}
        added = rust.get_added_tokens_decoder()
        self._special_ids = frozenset(
            token_id for token_id, token in added.items() if token.special
        )
        self._bos_id = self._id_of("bos_token")
        self.control_token_mask = ControlTokenMask(
            token.content for token in added.values() if token.special
        )
        """Hides this vocabulary's control tokens in text."""
        unknown_id = self._id_of("unk_token")
        self.literal_encoder = LiteralEncoder(
            rust, frozenset() if unknown_id is None else frozenset({unknown_id})
        )
        """Encodes text in which some control tokens are plain text."""
        self.longest_token_chars = max(len(token) for token in self._tokens if token is not None)
        """Length of the longest token in characters: n tokens hold at most n times as many."""

    @classmethod
    def from_dir(cls, model_dir: Path) -> "Tokenizer":
        """Reads tokenizer.json, tokenizer_config.json and special_tokens_map.json.

        Raises TextUnavailable if there is no tokenizer.json, BadCheckpoint if a file is broken or
        its decoder is of a kind that cannot stream.
        """
        file = model_dir / "tokenizer.json"
        if not file.is_file():
            raise TextUnavailable(
                f"{model_dir} has no tokenizer.json: this model takes and gives token ids only"
            )
        rust = _read_rust_tokenizer(file)
        special = load_special_tokens(model_dir)
        apply_special_tokens(rust, special, model_dir)
        try:
            return cls(rust, special.named)
        except UnsupportedDecoder as error:
            raise BadCheckpoint(file, str(error)) from error

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that has a token. The model may have more rows."""
        return len(self._tokens)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; control tokens written out in it count as such.

        With `add_special_tokens` what the checkpoint's post-processor says is added around it, save
        for a BOS before a text that begins with BOS (a chat rendered elsewhere).
        """
        ids: list[int] = self._rust.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._bos_id is not None and ids[:2] == [self._bos_id] * 2:
            own = self._rust.encode(text, add_special_tokens=False).ids
            # Two of them in the text itself are the author's wish.
            if len(own) < len(ids) and own[0] == self._bos_id:
                return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without a token give none."""
        return self._rust.decode(ids, skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None if there is none with this id."""
        return self._tokens[token_id] if 0 <= token_id < len(self._tokens) else None

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one token stands for, alone; b"" for ids without a token.

        They need not be whole characters.
        """
        token = self.token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return byte_level_bytes(token, byte_level_alphabet())
        byte = byte_fallback_value(token)
        return token.replace("\u2581", " ").encode() if byte is None else bytes([byte])

    def is_special(self, token_id: int) -> bool:
        """Whether the id is one of a special (control) token."""
        return token_id in self._special_ids

    def settled_texts(self, skip_special_tokens: bool) -> dict[int, str]:
        """Where detokenisers remember texts of ids that depend on no other id.

        As many entries as the vocabulary has tokens at most.
        """
        return self._settled_texts[skip_special_tokens]

    def new_decoder_stages(self) -> list[Stage]:
        """Fresh streaming stages of this tokenizer's decoder, in order."""
        return [factory() for factory in self._stage_factories]

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._rust.token_to_id(text)


def _read_rust_tokenizer(file: Path) -> RustTokenizer:
    # The library raises bare Exception for whatever it cannot parse; nothing carries on here.
    try:
        return RustTokenizer.from_file(str(file))
    except Exception as error:
        raise BadCheckpoint(file, f"the tokenizers library cannot read it: {error}") from error


def _tokens_by_id(rust: RustTokenizer) -> list[str | None]:
    vocabulary: Iterable[tuple[str, int]] = rust.get_vocab(with_added_tokens=True).items()
    by_id = {token_id: token for token, token_id in vocabulary}
    # An added token may share its id with a model token of another spelling; the added one counts.
    by_id |= {
        token_id: token.content for token_id, token in rust.get_added_tokens_decoder().items()
    }
    return [by_id.get(token_id) for token_id in range(max(by_id, default=-1) + 1)]
