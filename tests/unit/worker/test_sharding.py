"""Any split covers the model once, and every rank can compute what it holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.model_configs import make_config
from worker.errors import UnsupportedModel
from worker.models.spec import ModelSpec, parse_model_spec
from worker.sharding import GRANULE, ShardSpec, make_shard_spec


def make_spec(**fields: Any) -> ModelSpec:
    return dataclasses.replace(parse_model_spec(make_config(), "config.json"), **fields)


def shards_of(spec: ModelSpec, world_size: int) -> list[ShardSpec]:
    return [make_shard_spec(spec, rank, world_size) for rank in range(world_size)]


def test_nine_query_and_three_kv_heads_on_two_ranks_are_six_and_three() -> None:
    first, second = shards_of(make_spec(), 2)
    assert (first.num_local_q_heads, first.num_local_kv_heads) == (6, 2)
    assert (second.num_local_q_heads, second.num_local_kv_heads) == (3, 1)
    assert (second.q_head_start, second.kv_head_start) == (6, 2)


def test_rank_stores_every_kv_head_that_its_queries_touch() -> None:
    shards = shards_of(make_spec(num_q_heads=14, num_kv_heads=2), 4)
    assert [s.num_local_q_heads for s in shards] == [4, 4, 3, 3]
    assert [(s.kv_head_start, s.num_local_kv_heads) for s in shards] == [
        (0, 1),
        (0, 2),
        (1, 1),
        (1, 1),
    ]
    assert [s.q_offset for s in shards] == [0, 4, 1, 4]


def test_ranks_without_a_granule_hold_padding_only() -> None:
    shards = shards_of(make_spec(ffn_size=100, vocab_size=70), 4)
    assert [(s.ffn_start, s.num_local_ffn) for s in shards] == [
        (0, 64),
        (64, 36),
        (100, 0),
        (100, 0),
    ]
    assert [s.padded_ffn for s in shards] == [64, 64, 64, 64]
    assert [(s.vocab_start, s.num_local_vocab) for s in shards] == [
        (0, 64),
        (64, 6),
        (70, 0),
        (70, 0),
    ]


def test_more_ranks_than_query_heads_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="degree 10 is above num_attention_heads 9"):
        make_shard_spec(make_spec(), 0, 10)


@given(
    num_kv_heads=st.integers(1, 12),
    group=st.integers(1, 9),
    ffn_size=st.integers(1, 2000),
    vocab_size=st.integers(1, 2000),
    world_size=st.integers(1, 8),
)
def test_shards_cover_the_model_once(
    num_kv_heads: int, group: int, ffn_size: int, vocab_size: int, world_size: int
) -> None:
    num_q_heads = num_kv_heads * group
    if world_size > num_q_heads:
        return
    spec = make_spec(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        ffn_size=ffn_size,
        vocab_size=vocab_size,
    )
    q_end = ffn_end = vocab_end = 0
    for shard in shards_of(spec, world_size):
        assert shard.q_head_start == q_end and shard.num_local_q_heads > 0
        for local in range(shard.num_local_q_heads):
            local_kv = (local + shard.q_offset) // shard.q_per_kv
            assert 0 <= local_kv < shard.num_local_kv_heads
            assert shard.kv_head_start + local_kv == (shard.q_head_start + local) // group
        assert shard.ffn_start == ffn_end and shard.vocab_start == vocab_end
        assert 0 <= shard.padded_ffn - shard.num_local_ffn <= GRANULE
        assert shard.num_local_vocab <= shard.padded_vocab
        assert shard.padded_ffn % GRANULE == shard.padded_vocab % GRANULE == 0
        q_end += shard.num_local_q_heads
        ffn_end += shard.num_local_ffn
        vocab_end += shard.num_local_vocab
    assert (q_end, ffn_end, vocab_end) == (num_q_heads, ffn_size, vocab_size)
    assert len({shard.padded_vocab for shard in shards_of(spec, world_size)}) == 1
    if num_kv_heads >= world_size:
        held = sum(shard.num_local_kv_heads for shard in shards_of(spec, world_size))
        assert held == num_kv_heads
