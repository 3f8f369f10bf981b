"""Encodes text in which control tokens that a user wrote stay plain text.

A tokenizer cuts its input at control tokens before anything else happens, so text around one is
encoded differently from the same text elsewhere (prefix spaces, merges). Encoding the segments
between the template's own control tokens one by one would lose that. Therefore the whole text is
encoded at once by a second tokenizer around the same model in which

- control tokens are not recognised, so those of the user are characters;
- every control token has a stand-in, a token with the same matching flags whose text nobody can
  guess. The template's own control tokens are written as stand-ins, and the stand-ins' ids are
  exchanged for the real ones afterwards.
"""

import re
import secrets
from collections.abc import Iterable, Mapping

from tokenizers import AddedToken, Tokenizer

from coordinator.errors import BadRequest


class LiteralEncoder:
    """See the module. Never changes once made; any thread may use it."""

    def __init__(self, rust: Tokenizer, allowed_ids: frozenset[int]) -> None:
        """`allowed_ids` are special ids that plain text may give (unknown token).

        `rust` must not change afterwards; its model is shared, not copied.
        """
        added = rust.get_added_tokens_decoder()
        control = {token_id: token for token_id, token in added.items() if token.special}
        nonce = secrets.token_hex(16)
        self._stand_ins = {
            token.content: f"\U000f0000{nonce}.{token_id}\U000f0001"
            for token_id, token in control.items()
        }
        self._rust = _without_added_tokens(rust)
        # Control tokens that the model itself could choose for plain text, which some do.
        in_model = map(self._rust.token_to_id, self._stand_ins)
        self._refused_ids = {
            token_id for token_id in in_model if token_id is not None
        } - allowed_ids
        self._rust.add_tokens([token for token in added.values() if not token.special])
        self._rust.add_tokens(
            [_stand_in(token, self._stand_ins[token.content]) for token in control.values()]
        )
        # Added tokens get ids in the order of adding, so here they may have others.
        self._real_ids = {
            self._rust.token_to_id(self._stand_ins.get(token.content, token.content)): token_id
            for token_id, token in added.items()
        }
        self._added_pattern = _any_of(token.content for token in added.values())

    def encode(self, masked: str, literals: Mapping[str, str]) -> list[int]:
        """Ids of `masked` with its masks (single characters) replaced by their `literals`.

        Control tokens that stand in `masked` itself become their ids; what `literals` bring never
        does. Raises BadRequest if the vocabulary writes a literal only as the control token.
        """
        text = self._added_pattern.sub(
            lambda match: self._stand_ins.get(match[0], match[0]), masked
        ).translate({ord(mask): literal for mask, literal in literals.items()})
        ids = self._rust.encode(text, add_special_tokens=False).ids
        for token_id in self._refused_ids.intersection(ids):
            raise BadRequest(
                "chat.messages",
                self._rust.id_to_token(token_id),
                "free of this control token, which this model cannot write as plain text",
            )
        return [self._real_ids.get(token_id, token_id) for token_id in ids]


def _without_added_tokens(rust: Tokenizer) -> Tokenizer:
    bare = Tokenizer(rust.model)
    if rust.normalizer is not None:
        bare.normalizer = rust.normalizer
    if rust.pre_tokenizer is not None:
        bare.pre_tokenizer = rust.pre_tokenizer
    return bare


def _stand_in(token: AddedToken, text: str) -> AddedToken:
    return AddedToken(
        text,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=False,
        special=False,
    )


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches as the library does: leftmost, and of those the longest."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
