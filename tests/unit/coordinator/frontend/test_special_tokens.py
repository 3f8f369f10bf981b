"""Where names and flags of special tokens come from."""

import json
from pathlib import Path
from typing import Any

from coordinator.frontend.special_tokens import apply_special_tokens, load_special_tokens
from tests.unit.coordinator.frontend.small_tokenizers import byte_level, metaspace


def _write(model_dir: Path, name: str, content: dict[str, Any]) -> None:
    (model_dir / name).write_text(json.dumps(content))


def test_names_are_those_that_templates_know(tmp_path: Path) -> None:
    _write(
        tmp_path,
        "tokenizer_config.json",
        {
            "bos_token": {"content": "<s>"},
            "eos_token": "</s>",
            "pad_token": None,
            "image_token": "<image>",
            "add_bos_token": True,
            "additional_special_tokens": ["<a>", {"content": "<b>"}],
            "extra_special_tokens": {"audio_token": "<audio>"},
        },
    )
    special = load_special_tokens(tmp_path)
    assert special.named == {"bos_token": "<s>", "eos_token": "</s>"}
    assert sorted(special.others) == ["<a>", "<audio>", "<b>", "<image>"]


def test_special_tokens_map_is_not_read_where_config_declares_tokens(tmp_path: Path) -> None:
    _write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": {}, "eos_token": "</s>"})
    _write(tmp_path, "special_tokens_map.json", {"eos_token": "other", "bos_token": "<s>"})
    assert load_special_tokens(tmp_path).named == {"eos_token": "</s>"}


def test_flags_of_config_replace_those_of_tokenizer_json(tmp_path: Path) -> None:
    rust = metaspace()
    entry = {"content": "<s>", "special": True, "lstrip": True, "normalized": False}
    _write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": {"1": entry}})
    apply_special_tokens(rust, load_special_tokens(tmp_path), tmp_path)
    assert rust.get_added_tokens_decoder()[1].lstrip
    assert rust.token_to_id("<s>") == 1


def test_added_token_that_config_calls_special_becomes_so(tmp_path: Path) -> None:
    rust = byte_level()
    _write(tmp_path, "tokenizer_config.json", {"additional_special_tokens": ["<think>", "<gone>"]})
    apply_special_tokens(rust, load_special_tokens(tmp_path), tmp_path)
    special = {token.content for token in rust.get_added_tokens_decoder().values() if token.special}
    assert "<think>" in special
    assert rust.token_to_id("<gone>") is None


def test_folder_without_either_file_names_nothing(tmp_path: Path) -> None:
    special = load_special_tokens(tmp_path)
    assert not special.named and not special.others and not special.added
