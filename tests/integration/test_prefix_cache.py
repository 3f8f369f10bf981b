"""Conversations over real ranks: what is cached is not computed again, and nothing else changes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.multi_turn import Workload, run_workload
from tests.helpers.served_group import ServedGroup, value_of
from tests.integration.conftest import CPU_FLAGS

pytestmark = pytest.mark.timeout(240)
_WORKLOAD = Workload(
    conversations=32, turns=8, system_tokens=1000, user_tokens=40, output_tokens=24, vocab_size=301
)
# A block of rank 0, with 2 of 3 KV heads, is 4 KiB: room for all conversations.
_FLAGS = ("--tp", "2", "--max-model-len", "2048", "--kv-cache-bytes", "20M")


@pytest.fixture(scope="module")
def group(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGroup]:
    folder = tmp_path_factory.mktemp("prefix-cache")
    with ServedGroup(tiny_dir, folder, *CPU_FLAGS, *_FLAGS) as group:
        yield group


def test_conversations_compute_at_most_15_percent_of_their_prompts_and_say_the_same(
    group: ServedGroup,
) -> None:
    without = asyncio.run(run_workload(group.address, _WORKLOAD, use_prefix_cache=False))
    assert without.num_cached_tokens == 0
    assert value_of(group.metrics, "lockstep_prefix_cache_queries_total") == 0
    cached = asyncio.run(run_workload(group.address, _WORKLOAD))
    assert cached.outputs == without.outputs
    assert cached.num_prompt_tokens == without.num_prompt_tokens
    assert cached.saved_share >= 0.85
    queries = value_of(group.metrics, "lockstep_prefix_cache_queries_total")
    hits = value_of(group.metrics, "lockstep_prefix_cache_hits_total")
    assert hits == cached.num_cached_tokens
    assert queries == cached.num_prompt_tokens
