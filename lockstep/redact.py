"""Takes secrets out of text that leaves the host."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

REMOVED = "[removed]"
# Words of a name that make its value a secret. Tokens of a model are none: tokens, tokenizer,
# token_ids, first_token_seconds.
_NAME = (
    r"[\w.-]*(?:secret|token(?![a-z]|[_-](?:id|text|count|seconds|latency))|passwo?r?d|passphrase|credential|"
    r"api[_-]?key|access[_-]?key|private[_-]?key|authorization)[\w.-]*"
)
_IS_SECRET = re.compile(_NAME, re.IGNORECASE)
_LEAST_LENGTH = 4
_RULES = (
    (
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*-----|\Z)", re.S),
        REMOVED,
    ),
    (re.compile(rf"(?i)({_NAME}[\"']?\s*[:=]\s*)(?:bearer\s+)?[\"']?[^\s\"',;]+"), rf"\1{REMOVED}"),
    (re.compile(rf"(?i)(--{_NAME}\s+)\S+"), rf"\1{REMOVED}"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{4,}"), rf"\1 {REMOVED}"),
    (re.compile(r"\b(?:hf_|sk-|ghp_|xox[abp]-|AKIA)[\w-]{8,}"), REMOVED),
    (re.compile(r"(\w://)\S+@"), rf"\1{REMOVED}@"),
    # JSON web tokens.
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{4,}\.[\w-]*"), REMOVED),
)


def is_secret_name(name: str) -> bool:
    """Whether a setting or variable of this name holds a secret."""
    return _IS_SECRET.fullmatch(name) is not None


class Redactor:
    """Replaces what looks like a secret, and the values of secrets that are known."""

    def __init__(self) -> None:
        self._values: set[str] = set()

    def learn(self, settings: Mapping[str, str]) -> None:
        """The values of secret settings are removed from now on, wherever they stand."""
        self.learn_values(value for name, value in settings.items() if is_secret_name(name))

    def learn_values(self, values: Iterable[str]) -> None:
        """These are secrets. Shorter ones than four characters would take half the text away."""
        self._values |= {value for value in values if len(value) >= _LEAST_LENGTH}

    def clean(self, text: str) -> str:
        """`text` without them."""
        for value in sorted(self._values, key=len, reverse=True):
            text = text.replace(value, REMOVED)
        for pattern, replacement in _RULES:
            text = pattern.sub(replacement, text)
        return text
