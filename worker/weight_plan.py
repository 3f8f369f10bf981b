"""Which rectangle of which checkpoint tensor fills which part of this rank's weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from worker.checkpoint import Checkpoint
from worker.errors import CheckpointError
from worker.models.spec import ModelSpec
from worker.sharding import ShardSpec
from worker.slice_reader import Rectangle
from worker.weight_layout import LayerWeights, TransformerWeights


@dataclass(frozen=True)
class Slice:
    """One read: `area` of tensor `name`, which has `full_shape`, goes to `destination`."""

    name: str
    full_shape: tuple[int, ...]
    area: Rectangle
    destination: Tensor
    is_norm: bool = False


def plan_slices(spec: ModelSpec, shard: ShardSpec, weights: TransformerWeights) -> list[Slice]:
    """Every read that fills `weights`; together they cover all of it but the padding."""
    names, vocab = spec.names, (spec.vocab_size, spec.hidden_size)
    slices = [
        _rows(names.embedding, vocab, shard.vocab_start, weights.embedding[: shard.num_local_vocab])
    ]
    if not spec.tie_embeddings:
        head = weights.lm_head[: shard.num_local_vocab]
        slices.append(_rows(names.lm_head, vocab, shard.vocab_start, head))
    slices.append(_norm(names.final_norm, weights.final_norm))
    for index, layer in enumerate(weights.layers):
        slices += _plan_layer(spec, shard, index, layer)
    return slices


def refuse_unread_tensors(checkpoint: Checkpoint, spec: ModelSpec, slices: list[Slice]) -> None:
    """A tensor that no layer asked for is arithmetic that would be left out: CheckpointError.

    Exceptions: stored rotary frequencies (computed here from config.json) and an LM head beside
    tied embeddings.
    """
    known = {piece.name for piece in slices} | _row_biases(spec) | {spec.names.lm_head}
    for name, entry in checkpoint.entries.items():
        if name not in known and not name.endswith("rotary_emb.inv_freq"):
            raise CheckpointError(
                f"{entry.path}: tensor {name}: expected none of this name for a {spec.family} model"
                f" of {spec.num_layers} layers, found {entry.dtype_name} {list(entry.shape)}"
            )


def _row_biases(spec: ModelSpec) -> set[str]:
    """Biases that only rank 0 reads."""
    parts = [spec.names.o] * spec.o_bias + [spec.names.down] * spec.mlp_bias
    return {
        f"{part.format(layer=layer)}.bias" for part in parts for layer in range(spec.num_layers)
    }


def _plan_layer(
    spec: ModelSpec, shard: ShardSpec, index: int, layer: LayerWeights
) -> Iterator[Slice]:
    names = spec.names
    yield _norm(names.input_norm.format(layer=index), layer.input_norm)
    yield _norm(names.post_attention_norm.format(layer=index), layer.post_attention_norm)
    if layer.q_norm is not None and layer.k_norm is not None:
        yield _norm(names.q_norm.format(layer=index), layer.q_norm)
        yield _norm(names.k_norm.format(layer=index), layer.k_norm)
    for name, full_rows, start, begin, count in _column_parallel(spec, shard):
        fused, bias = (
            (layer.qkv, layer.qkv_bias)
            if name in (names.q, names.k, names.v)
            else (layer.gate_up, layer.gate_up_bias)
        )
        stem, rows = name.format(layer=index), slice(begin, begin + count)
        yield _rows(f"{stem}.weight", (full_rows, spec.hidden_size), start, fused[rows])
        if bias is not None:
            yield _rows(f"{stem}.bias", (full_rows,), start, bias[rows])
    o, down = names.o.format(layer=index), names.down.format(layer=index)
    q_columns = (spec.hidden_size, spec.num_q_heads * spec.head_dim)
    yield _columns(f"{o}.weight", q_columns, shard.q_head_start * spec.head_dim, layer.o)
    ffn_columns = (spec.hidden_size, spec.ffn_size)
    real_down = layer.down[:, : shard.num_local_ffn]
    yield _columns(f"{down}.weight", ffn_columns, shard.ffn_start, real_down)
    for stem, bias in ((o, layer.o_bias), (down, layer.down_bias)):
        if bias is not None:
            yield _rows(f"{stem}.bias", (spec.hidden_size,), 0, bias)


def _column_parallel(
    spec: ModelSpec, shard: ShardSpec
) -> tuple[tuple[str, int, int, int, int], ...]:
    """(name, full rows, first full row, first row in the fused matrix, rows) of each projection."""
    names, dim = spec.names, spec.head_dim
    q_rows, kv_rows = shard.num_local_q_heads * dim, shard.num_local_kv_heads * dim
    q_start, kv_start, full_kv = (
        shard.q_head_start * dim,
        shard.kv_head_start * dim,
        spec.num_kv_heads * dim,
    )
    ffn = shard.num_local_ffn
    return (
        (names.q, spec.num_q_heads * dim, q_start, 0, q_rows),
        (names.k, full_kv, kv_start, q_rows, kv_rows),
        (names.v, full_kv, kv_start, q_rows + kv_rows, kv_rows),
        (names.gate, spec.ffn_size, shard.ffn_start, 0, ffn),
        (names.up, spec.ffn_size, shard.ffn_start, shard.padded_ffn, ffn),
    )


def _rows(name: str, full_shape: tuple[int, ...], start: int, destination: Tensor) -> Slice:
    num_cols = full_shape[1] if len(full_shape) == 2 else 1
    area = Rectangle(start, destination.shape[0], 0, num_cols)
    return Slice(name, full_shape, area, destination)


def _columns(name: str, full_shape: tuple[int, int], start: int, destination: Tensor) -> Slice:
    area = Rectangle(0, full_shape[0], start, destination.shape[1])
    return Slice(name, full_shape, area, destination)


def _norm(name: str, destination: Tensor) -> Slice:
    size = destination.shape[0]
    return Slice(name, (size,), Rectangle(0, size, 0, 1), destination, is_norm=True)
