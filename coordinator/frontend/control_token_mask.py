"""Hides control tokens in what a user wrote while a chat template is rendered.

Each one is replaced by a mask, a single private-use character that survives what templates do to
text (trimming, joining, tojson), and is put back, as plain text, when the result is encoded.
Rendering text and template apart from each other would show who wrote what as well, but templates
branch on their input (strip reasoning, compare roles), so they must see all of it but this.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from coordinator.errors import BadRequest

# Supplementary Private Use Area-B: no font, no normaliser and no template gives these a meaning.
_FIRST_MASK = 0x100000
_LAST_MASK = 0x10FFFD
_POSSIBLE_MASKS = re.compile(f"[{chr(_FIRST_MASK)}-{chr(_LAST_MASK)}]")


class ControlTokenMask:
    """Masks the control tokens of one vocabulary. Never changes; any thread may use it.

    Masked are whole control tokens and, at the end of a string, the beginning of one: templates
    join strings (the parts of a message), and "<|im_" + "end|>" must not become what neither is.
    A beginning of letters and digits alone is left: words like "user" are what templates compare.
    """

    def __init__(self, control_tokens: Iterable[str]) -> None:
        tokens = sorted(filter(None, control_tokens), key=len, reverse=True)
        self._whole = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        beginnings = (token[:length] for token in tokens for length in range(1, len(token)))
        self._beginnings = frozenset(text for text in beginnings if not text.isalnum())
        self._longest_beginning = max(map(len, self._beginnings), default=0)

    def mask(self, value: Any, taken: str) -> tuple[Any, dict[str, str]]:
        """Returns a copy of `value` with its strings masked, and mask -> hidden text.

        `value` is made of strings, lists, mappings and whatever else JSON has; `taken` is text
        whose characters may not serve as masks. Raises BadRequest if no character is left.
        """
        masks = _Masks(taken)
        masked = self._mask(value, masks)
        return masked, {mask: hidden for hidden, mask in masks.by_hidden.items()}

    def _mask(self, value: Any, masks: "_Masks") -> Any:
        if isinstance(value, str):
            return self._mask_text(value, masks)
        if isinstance(value, list | tuple):
            return [self._mask(item, masks) for item in value]
        if isinstance(value, dict):
            return {self._mask(key, masks): self._mask(item, masks) for key, item in value.items()}
        return value

    def _mask_text(self, text: str, masks: "_Masks") -> str:
        text = self._whole.sub(lambda match: masks.mask_of(match[0]), text)
        kept = text.rstrip()
        for length in range(min(self._longest_beginning, len(kept)), 0, -1):
            tail = kept[-length:]
            if tail in self._beginnings:
                return kept[:-length] + masks.mask_of(tail) + text[len(kept) :]
        return text


class _Masks:
    """One request's masks, handed out one per hidden text."""

    def __init__(self, taken: str) -> None:
        self.by_hidden: dict[str, str] = {}
        self._taken = frozenset(_POSSIBLE_MASKS.findall(taken))
        self._next_code = _FIRST_MASK

    def mask_of(self, hidden: str) -> str:
        if hidden not in self.by_hidden:
            self.by_hidden[hidden] = self._unused()
        return self.by_hidden[hidden]

    def _unused(self) -> str:
        for code in range(self._next_code, _LAST_MASK + 1):
            if chr(code) not in self._taken:
                self._next_code = code + 1
                return chr(code)
        limit = "free of control tokens or of most of the private-use characters from U+100000 on"
        raise BadRequest("chat.messages", "text with both", limit)


def all_text(value: Any) -> str:
    """Every string in `value`, keys of mappings included, joined."""
    return "".join(_strings(value))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
