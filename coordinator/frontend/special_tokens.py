"""Which tokens a checkpoint calls special, and under which names templates know them.

Sources: tokenizer_config.json and, where that has no `added_tokens_decoder`,
special_tokens_map.json: the order in which transformers reads them. `add_bos_token` and
`add_eos_token` are for checkpoints without a tokenizer.json; here its post-processor rules.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from coordinator.errors import BadCheckpoint
from coordinator.frontend.checkpoint_files import read_json_object

_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class SpecialTokens:
    """What tokenizer_config.json and special_tokens_map.json say about special tokens."""

    named: Mapping[str, str]
    """Name ("bos_token", ...) -> text."""
    others: tuple[str, ...]
    """Special tokens without a standard name."""
    added: Mapping[int, AddedToken]
    """Id -> token, from `added_tokens_decoder`."""


def load_special_tokens(model_dir: Path) -> SpecialTokens:
    """Reads both files. Raises BadCheckpoint for content that is not what it should be."""
    file = model_dir / "tokenizer_config.json"
    config = read_json_object(file)
    if "added_tokens_decoder" not in config:
        config |= read_json_object(model_dir / "special_tokens_map.json")
    try:
        added = {
            int(token_id): _added_token(entry)
            for token_id, entry in (config.get("added_tokens_decoder") or {}).items()
        }
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise BadCheckpoint(file, f"added_tokens_decoder: {error!r}") from error
    return SpecialTokens(
        named={name: _text(config[name]) for name in _NAMES if config.get(name) is not None},
        others=_other_tokens(config),
        added=added,
    )


def apply_special_tokens(rust: RustTokenizer, special: SpecialTokens, model_dir: Path) -> None:
    """Brings a tokenizer made from tokenizer.json in line with `special`, in place.

    Tokens that are named special but missing in the vocabulary (a padding token nobody trained)
    stay missing: they would get an id that the model does not have.
    Raises BadCheckpoint where the two files give one token two ids.
    """
    _add_declared(rust, special, model_dir)
    present = rust.get_added_tokens_decoder()
    known = {token.content: token for token in present.values()}
    marked = []
    for text in (*special.named.values(), *special.others):
        token = known.get(text) or AddedToken(text, normalized=False)
        if rust.token_to_id(text) is not None and not token.special:
            marked.append(_with_special(token))
    if marked:
        rust.add_special_tokens(marked)


def _add_declared(rust: RustTokenizer, special: SpecialTokens, model_dir: Path) -> None:
    present = {token_id: repr(token) for token_id, token in rust.get_added_tokens_decoder().items()}
    for token_id, token in sorted(special.added.items()):
        if present.get(token_id) == repr(token):
            continue
        rust.add_tokens([token])
        found = rust.token_to_id(token.content)
        if found != token_id:
            raise BadCheckpoint(
                model_dir / "tokenizer_config.json",
                f"added_tokens_decoder gives {token.content!r} the id {token_id}, "
                f"tokenizer.json {found}; make the two agree",
            )


def _other_tokens(config: Mapping[str, Any]) -> tuple[str, ...]:
    texts: list[Any] = []
    for key in _LISTS:
        tokens = config.get(key) or []
        texts += tokens.values() if isinstance(tokens, dict) else tokens
    texts += [
        value for key, value in config.items() if key.endswith("_token") and key not in _NAMES
    ]
    return tuple(_text(text) for text in texts if isinstance(text, str | dict))


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    return AddedToken(
        entry["content"],
        lstrip=bool(entry.get("lstrip", False)),
        rstrip=bool(entry.get("rstrip", False)),
        single_word=bool(entry.get("single_word", False)),
        normalized=bool(entry.get("normalized", not entry.get("special", False))),
        special=bool(entry.get("special", False)),
    )


def _with_special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=token.normalized,
        special=True,
    )


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)
