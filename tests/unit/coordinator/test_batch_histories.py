"""Scheduler, allocator, prefix cache and batch together, under any history."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.block_allocator import BlockAllocator
from coordinator.prefix_cache import PrefixCache
from coordinator.request import Request
from coordinator.tables import RowTable
from tests.helpers.fake_tables import Refusal
from tests.helpers.random_history import MOVES, History, run_history


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    moves=st.lists(st.sampled_from(MOVES), min_size=20, max_size=120),
    use_prefix_cache=st.booleans(),
)
def test_any_history_keeps_every_rule_and_gives_every_request_its_own_tokens(
    seed: int, moves: list[str], use_prefix_cache: bool
) -> None:
    draw = Random(seed)
    history = History(seed, use_prefix_cache)
    for move in moves:
        history.move(move, draw)
    history.finish(draw)


def test_the_histories_see_preemption_hits_samples_and_long_grants() -> None:
    num_preemptions = num_hits = num_samples = num_long = 0
    for seed in range(8):
        history = run_history(seed, 150)
        num_preemptions += history.batch.take_num_preemptions()
        num_hits += history.batch.prefix_cache.take_counts()[1]
        num_samples += sum(request.leader is not None for request in history.requests)
        num_long += history.batch.last_step > history.batch.last_command_id
    assert num_preemptions > 10 and num_hits > 100 and num_samples > 10 and num_long > 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_long_histories_keep_every_rule(seed: int) -> None:
    run_history(seed, 2000, use_prefix_cache=seed % 3 > 0)


def _register_one_token_too_many(cache: PrefixCache, request: Request) -> None:
    cache._register(request, max(request.num_prefilled, request.num_to_prefill))


def _find_the_whole_prompt(cache: PrefixCache, request: Request) -> object:
    keys = request.prefix_keys
    return cache._allocator.find(keys.keys) if keys else ()


def _all_are_one_tenant(cache: PrefixCache, request: Request) -> None:
    cache._give_keys(request, b"tenant:")


def _release_as_if_unshared(allocator: BlockAllocator, block_ids: list[int]) -> None:
    allocator._free.extend(block_ids)


def _keep_the_key(allocator: BlockAllocator, block_id: int) -> None:
    allocator._block_of.pop(b"", None)


def _advance_one(rows: RowTable, num_steps: int) -> None:
    rows.next_positions[:] += 1


def _register_before_it_is_sent(cache: PrefixCache, request: Request) -> None:
    cache._register(request, request.prefill_len)


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (PrefixCache, "leave", _register_one_token_too_many),
        (PrefixCache, "chunk_sent", _register_before_it_is_sent),
        (PrefixCache, "find", _find_the_whole_prompt),
        (PrefixCache, "enrol", _all_are_one_tenant),
        (BlockAllocator, "release", _release_as_if_unshared),
        (BlockAllocator, "_forget", _keep_the_key),
        (RowTable, "advance", _advance_one),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_planted_fault_is_found(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, fault: object
) -> None:
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises((AssertionError, Refusal)):
        for seed in range(40):
            run_history(seed, 150)
