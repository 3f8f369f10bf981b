"""Packed weights multiply as row-major ones do, and take their place in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_models import write_tiny_model
from worker.cpu_packing import can_pack, pack_weights, packed_linear
from worker.models.spec import load_model_spec
from worker.sharding import make_shard_spec
from worker.weight_layout import TransformerWeights
from worker.weights import load_weights

CPU = torch.device("cpu")


def load(model_dir: Path, dtype: torch.dtype, pack: bool) -> TransformerWeights:
    spec = load_model_spec(model_dir)
    return load_weights(
        model_dir,
        spec,
        make_shard_spec(spec, 1, 2),
        dtype=dtype,
        device=CPU,
        load_format="safetensors",
        progress=lambda done, total: None,
        pack=pack,
    )[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 65])
def test_packed_weights_multiply_as_row_major_ones(
    tmp_path: Path, dtype: torch.dtype, num_tokens: int
) -> None:
    if not can_pack(dtype, CPU):
        pytest.skip(f"this processor has no packed {dtype} kernels")
    write_tiny_model(tmp_path, "llama_biases")
    plain, packed = load(tmp_path, dtype, False), load(tmp_path, dtype, True)
    for name in ("qkv", "gate_up", "o", "down"):
        weight = getattr(plain.layers[1], name)
        bias = getattr(plain.layers[1], f"{name}_bias")
        rows = torch.randn(num_tokens, weight.shape[1], dtype=dtype)
        product = packed_linear(rows, getattr(packed.layers[1], name), bias)
        assert getattr(packed.layers[1], name).is_mkldnn
        torch.testing.assert_close(product, packed_linear(rows, weight, bias))


def test_packing_frees_the_originals_but_for_a_tied_embedding(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    plain = load(tmp_path, torch.float32, False)
    packed = pack_weights(plain)
    assert packed.embedding is plain.embedding and packed.embedding.untyped_storage().nbytes()
    assert packed.lm_head.is_mkldnn and packed.lm_head.shape == plain.embedding.shape
    assert plain.layers[0].qkv.untyped_storage().nbytes() == 0
    assert packed.layers[0].qkv.shape == plain.layers[0].qkv.shape


def test_half_precision_and_other_devices_are_not_packed() -> None:
    assert not can_pack(torch.float16, CPU)
    assert not can_pack(torch.float32, torch.device("meta"))
