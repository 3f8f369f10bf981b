"""config.json is honoured or refused by name; nothing that changes arithmetic is passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.model_configs import make_config
from worker.errors import UnsupportedModel
from worker.models.config_keys import NEUTRAL_VALUES
from worker.models.spec import ModelSpec, load_model_spec, parse_model_spec
from worker.rope import RopeType


def parse(config: dict[str, Any]) -> ModelSpec:
    return parse_model_spec(config, "config.json")


def test_smollm2_config_gives_its_sizes_and_ignores_metadata() -> None:
    spec = parse(
        make_config(
            rope_theta=100000,
            tie_word_embeddings=True,
            rope_interleaved=False,
            is_llama_config=True,
            attention_dropout=0.0,
            initializer_range=0.041666666666666664,
            pretraining_tp=1,
            use_cache=True,
            **{"transformers.js_config": {"kv_cache_dtype": "fp16"}},
        )
    )
    assert (spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.q_per_kv) == (9, 3, 64, 3)
    assert (spec.hidden_size, spec.ffn_size, spec.num_layers) == (576, 1536, 30)
    assert spec.rope.theta == 100000.0 and spec.rope.rope_type is RopeType.DEFAULT
    assert spec.tie_embeddings and spec.torch_dtype is torch.bfloat16
    assert not (spec.qkv_bias or spec.o_bias or spec.mlp_bias or spec.qk_norm)


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("llama", {}, (False, False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False, False)),
        ("llama", {"mlp_bias": True}, (False, False, True, False)),
        ("mistral", {"sliding_window": None, "attention_bias": False}, (False,) * 4),
        ("qwen2", {}, (True, False, False, False)),
        ("qwen2", {"attention_bias": True}, (True, False, False, False)),
        ("qwen3", {}, (False, False, False, True)),
        ("qwen3", {"attention_bias": True}, (True, True, False, True)),
    ],
)
def test_biases_and_norms_follow_the_family(
    model_type: str, fields: dict[str, Any], expected: tuple[bool, ...]
) -> None:
    spec = parse(make_config(model_type, **fields))
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.qk_norm) == expected


def test_qwen3_without_head_dim_has_its_own_default() -> None:
    assert parse(make_config("qwen3")).head_dim == 128
    assert parse(make_config("qwen2")).head_dim == 64


def test_absent_kv_heads_mean_one_per_query_head() -> None:
    assert parse(make_config(num_key_value_heads=None)).num_kv_heads == 9


@pytest.mark.parametrize("key", sorted(NEUTRAL_VALUES))
def test_every_arithmetic_key_is_refused_by_name_and_value(key: str) -> None:
    with pytest.raises(UnsupportedModel, match=rf"config.json: {key} = 'planted' is not supported"):
        parse(make_config(**{key: "planted"}))
    for neutral in NEUTRAL_VALUES[key]:
        parse(make_config(**{key: neutral}))


@pytest.mark.parametrize(
    ("model_type", "fields", "key"),
    [
        ("llama", {"model_type": "mixtral"}, "model_type"),
        ("llama", {"model_type": None}, "model_type"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp"),
        ("llama", {"logit_scale": 0.0625}, "logit_scale"),
        ("llama", {"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
        ("llama", {"hidden_size": 577}, "num_attention_heads"),
        ("llama", {"head_dim": 63}, "head_dim"),
        ("llama", {"num_key_value_heads": 4}, "num_key_value_heads"),
        ("llama", {"vocab_size": 0}, "vocab_size"),
        ("llama", {"num_hidden_layers": "30"}, "num_hidden_layers"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("llama", {"mlp_bias": 1}, "mlp_bias"),
        ("llama", {"sliding_window": 4096}, "sliding_window"),
        ("llama", {"use_sliding_window": True}, "use_sliding_window"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("mistral", {}, "sliding_window"),
        ("mistral", {"sliding_window": 4096}, "sliding_window"),
        ("mistral", {"sliding_window": None, "attention_bias": True}, "attention_bias"),
        ("qwen2", {"attention_bias": False}, "attention_bias"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4096}, "sliding_window"),
        ("qwen3", {"num_experts": 128}, "num_experts"),
    ],
)
def test_unsupported_value_is_refused_by_key(
    model_type: str, fields: dict[str, Any], key: str
) -> None:
    with pytest.raises(UnsupportedModel, match=rf"config.json: {key} = "):
        parse({**make_config(model_type), **fields})


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 8192}),  # never shorter than the context
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4096}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 30}),
        ("qwen3", {"layer_types": ["full_attention"] * 30}),
    ],
)
def test_window_that_never_bites_is_accepted(model_type: str, fields: dict[str, Any]) -> None:
    assert parse(make_config(model_type, **fields)).family == model_type


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    ],
)
def test_both_spellings_of_rope_mean_the_same(fields: dict[str, Any]) -> None:
    rope = parse(make_config(**fields)).rope
    assert rope.rope_type is RopeType.LLAMA3 and rope.theta == 500000.0
    assert (rope.factor, rope.low_freq_factor, rope.high_freq_factor) == (8.0, 1.0, 4.0)
    assert rope.original_max_position == 8192


def test_old_type_key_of_rope_scaling_is_read() -> None:
    rope = parse(make_config(rope_scaling={"type": "linear", "factor": 4})).rope
    assert (rope.rope_type, rope.factor) == (RopeType.LINEAR, 4.0)


@pytest.mark.parametrize(
    ("scaling", "key"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "rope_type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        ({"rope_type": "default", "factor": 2.0}, "factor"),
        ({"rope_type": "yarn", "factor": 4.0, "short_factor": [1.0]}, "short_factor"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": 1}, "truncate"),
        ({"rope_type": "default", "partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ],
)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_rope_that_is_not_computed_is_refused(
    scaling: dict[str, Any], key: str, spelling: str
) -> None:
    with pytest.raises(UnsupportedModel, match=rf"{spelling}\.{key} = "):
        parse(make_config(**{spelling: scaling}))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not found"), ("{", "not JSON"), ("[]", "holds a list"), ("\xff", "not JSON")],
)
def test_unreadable_config_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UnsupportedModel, match=message):
        load_model_spec(tmp_path)


def test_config_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config()))
    assert load_model_spec(tmp_path) == parse(make_config())
