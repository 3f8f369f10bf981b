"""What generation_config.json may say, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.errors import BadCheckpoint
from coordinator.frontend.generation_defaults import GenerationDefaults, load_generation_defaults


def _load(
    model_dir: Path, generation: dict[str, Any] | None = None, model: dict[str, Any] | None = None
) -> GenerationDefaults:
    if generation is not None:
        (model_dir / "generation_config.json").write_text(json.dumps(generation))
    if model is not None:
        (model_dir / "config.json").write_text(json.dumps(model))
    return load_generation_defaults(model_dir, vocab_size=1000)


def test_folder_without_files_gives_the_defaults_of_the_api(tmp_path: Path) -> None:
    assert _load(tmp_path) == GenerationDefaults((), 1.0, 1.0, 0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        (2, None, (2,)),
        ([5, 2], None, (5, 2)),
        (None, 7, (7,)),
        ([5, 2], [2, 7], (5, 2, 7)),
        (None, None, ()),
    ],
)
def test_end_ids_of_both_files_count(
    generation: object, model: object, expected: tuple[int, ...], tmp_path: Path
) -> None:
    defaults = _load(tmp_path, {"eos_token_id": generation}, {"eos_token_id": model})
    assert defaults.eos_token_ids == expected


def test_sampling_values_are_taken_over(tmp_path: Path) -> None:
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
        "transformers_version": "4.51.0",
        "max_new_tokens": 2048,
        "pad_token_id": 0,
        "typical_p": 1.0,
        "num_beams": 1,
        "suppress_tokens": None,
    }
    assert _load(tmp_path, config) == GenerationDefaults((), 0.6, 0.95, 20, 0.05, 1.05)


def test_do_sample_false_means_greedy(tmp_path: Path) -> None:
    assert _load(tmp_path, {"do_sample": False, "temperature": 0.7}).temperature == 0.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", float("inf")),
        ("top_k", 10**400),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("eos_token_id", 1000),
        ("eos_token_id", -1),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [True]),
        ("eos_token_id", list(range(17))),
        ("num_beams", 4),
        ("no_repeat_ngram_size", 3),
        ("suppress_tokens", [1, 2]),
        ("typical_p", 0.9),
        ("token_healing", True),
        ("invented_penalty", 0.5),
    ],
)
def test_value_that_cannot_be_honoured_is_refused_by_name(
    key: str, value: object, tmp_path: Path
) -> None:
    with pytest.raises(BadCheckpoint, match=key) as caught:
        _load(tmp_path, {key: value})
    assert caught.value.file.name == "generation_config.json"


def test_end_id_outside_the_vocabulary_names_the_file_it_is_in(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="eos_token_id = 5000") as caught:
        _load(tmp_path, None, {"eos_token_id": 5000})
    assert caught.value.file.name == "config.json"


def test_every_key_that_transformers_writes_by_default_is_known(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig().to_dict() | GenerationConfig(max_new_tokens=5).to_diff_dict()
    assert _load(tmp_path, config) == GenerationDefaults()


def test_smollm2_ends_at_its_end_of_turn(smollm2_dir: Path) -> None:
    assert load_generation_defaults(smollm2_dir, 49152).eos_token_ids == (2,)
