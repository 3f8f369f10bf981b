"""The dense layer for few rows on a GPU: against its reference, in graphs, and as it is chosen."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from tests.helpers.linear_checks import LinearChecks
from worker.kernels.linear import gated_linear, linear
from worker.kernels.linear_tile import tiles_for
from worker.kernels.small_linear import small_linear
from worker.linear_choice import choose_linears
from worker.linear_table import LinearTable, row_bucket
from worker.weight_layout import LayerWeights, TransformerWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 1 GPU"),
]

DEVICE = torch.device("cuda", 0)
# Whole tiles, ragged in either dimension, few rows of weights, many.
SHAPES = ((1536, 4096), (1000, 4112), (4096, 1040), (6144, 14336), (37, 4096))


@pytest.mark.parametrize(
    ("num_rows", "dtype"),
    [(rows, torch.bfloat16) for rows in (1, 2, 8, 13, 32, 64)]
    + [(rows, torch.float16) for rows in (1, 13)],
    ids=str,
)
def test_every_variant_equals_its_reference(num_rows: int, dtype: torch.dtype) -> None:
    checks = LinearChecks(DEVICE, dtype)
    for out_size, in_size in SHAPES:
        for tile in tiles_for(_bucket(num_rows), in_size, is_gated=True):
            shape = (num_rows, out_size, in_size, tile)
            checks.product(*shape, has_bias=out_size == 1000)
            if out_size % 2 == 0:
                checks.product(*shape, has_bias=out_size == 1000, is_gated=True)


@pytest.mark.parametrize("num_rows", [1, 8, 16])
def test_replayed_chains_are_what_eager_calls_give(num_rows: int) -> None:
    """Each product takes the last one's result, so a launch that does not wait would be seen."""
    tiles = tiles_for(_bucket(num_rows), 4096, is_gated=False) * 3
    weights = [torch.randn(4096, 4096, device=DEVICE).bfloat16() / 64 for _ in tiles]
    x = torch.randn(num_rows, 4096, device=DEVICE).bfloat16()

    def chain() -> torch.Tensor:
        last = x
        for tile, weight in zip(tiles, weights, strict=True):
            last = small_linear(last, weight, None, tile)
        return last

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for seed in range(20):
        torch.manual_seed(seed)
        x.copy_(torch.randn(num_rows, 4096, device=DEVICE))
        graph.replay()
        graph.replay()
        replayed = captured.clone()
        assert torch.equal(replayed, chain()) and bool(replayed.isfinite().all())


def test_choices_are_measured_once_and_serve_every_number_of_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    weights = _weights(torch.bfloat16)
    table = choose_linears(weights, tmp_path)
    assert "measured in" in caplog.text
    caplog.clear()
    assert choose_linears(weights, tmp_path).tiles == table.tiles
    assert "known in" in caplog.text
    layer = weights.layers[0]
    for num_rows in (1, 2, 8, 9, 32, 33, 300):
        x = torch.randn(num_rows, 1024, device=DEVICE).bfloat16()
        for found, wanted in (
            (table.linear(x, layer.qkv, layer.qkv_bias), linear(x, layer.qkv, layer.qkv_bias)),
            (table.gated_linear(x, layer.gate_up, None), gated_linear(x, layer.gate_up, None)),
        ):
            torch.testing.assert_close(found, wanted, rtol=3.2e-2, atol=3.2e-2)


def test_float32_stays_with_the_vendors_kernels(tmp_path: Path) -> None:
    table = choose_linears(_weights(torch.float32), tmp_path)
    assert isinstance(table, LinearTable) and not table.tiles
    assert list(tmp_path.iterdir()) == []


def _bucket(num_rows: int) -> int:
    bucket = row_bucket(num_rows)
    assert bucket is not None
    return bucket


def _weights(dtype: torch.dtype) -> TransformerWeights:
    """Two layers of a small model, with a bias on QKV."""

    def randn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=DEVICE) / 32).to(dtype)

    norm = randn(1024)
    layer = LayerWeights(
        input_norm=norm,
        qkv=randn(4096, 1024),
        qkv_bias=randn(4096),
        q_norm=None,
        k_norm=None,
        o=randn(1024, 2048),
        o_bias=None,
        post_attention_norm=norm,
        gate_up=randn(6144, 1024),
        gate_up_bias=None,
        down=randn(1024, 3072),
        down_bias=None,
    )
    embedding = randn(5000, 1024)
    return TransformerWeights(embedding, (layer, layer), norm, embedding)
