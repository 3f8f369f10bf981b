"""The collective tests, once for every backend: subclass and give a `world` fixture."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.unit.tpcomm import cases
from tests.unit.tpcomm.rank_pool import RankPool
from tpcomm import ReduceOp, create_group_id
from tpcomm.communicator import REDUCIBLE_DTYPES

# Below, at and above slot, two-shot and chunk boundaries of the backends, in elements.
SHAPES = [(1,), (3,), (17, 5), (4096,), (3, 33_333), (300_001,)]
ANY_DTYPES = [torch.uint8, torch.bool, torch.float64, torch.bfloat16, torch.int32]


@dataclass(frozen=True)
class World:
    """A backend and a world size on a pool, with one group that tests share."""

    pool: RankPool
    backend: str
    size: int
    fixed_order: bool
    make_id: Callable[[], bytes]

    @functools.cached_property
    def group_id(self) -> bytes:
        return self.make_id()

    def run(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `case` on the shared group."""
        return self.pool.run(self.size, case, self.backend, self.group_id, *args)

    def run_alone(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `case` on a group of its own, which it may break."""
        return self.pool.run(self.size, case, self.backend, self.make_id(), *args)


def make_world(pool: RankPool, backend: str, size: int, *, fixed_order: bool) -> World:
    def make_id() -> bytes:
        return create_group_id(backend)

    return World(pool, backend, size, fixed_order, make_id)


class CollectiveSuite:
    """Behaviour that does not depend on the backend."""

    @pytest.mark.parametrize("op", list(ReduceOp))
    @pytest.mark.parametrize("dtype", REDUCIBLE_DTYPES, ids=str)
    def test_all_reduce_equals_reference_and_is_same_on_all_ranks(
        self, world: World, dtype: torch.dtype, op: ReduceOp
    ) -> None:
        for shape in SHAPES:
            digests = world.run(cases.all_reduce, shape, dtype, op, not world.fixed_order)
            assert len(set(digests)) == 1

    def test_all_reduce_gives_same_bits_when_repeated(self, world: World) -> None:
        arguments = ((999,), torch.bfloat16, ReduceOp.SUM, not world.fixed_order)
        first = world.run(cases.all_reduce, *arguments)
        assert world.run(cases.all_reduce, *arguments) == first

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_sum_residual_and_norm_are_the_same_on_all_ranks(
        self, world: World, dtype: torch.dtype
    ) -> None:
        assert len(set(world.run(cases.all_reduce_add_rms_norm, dtype))) == 1

    def test_empty_tensors_pass_through(self, world: World) -> None:
        world.run(cases.all_reduce, (0,), torch.float32, ReduceOp.SUM, True)
        world.run(cases.all_gather, (2, 0), torch.float32)
        world.run(cases.broadcast, (0, 3), torch.int64)

    @pytest.mark.parametrize("dtype", ANY_DTYPES, ids=str)
    def test_all_gather_of_any_dtype_is_rank_ordered(
        self, world: World, dtype: torch.dtype
    ) -> None:
        for shape in [(), (5,), (7, 3), (400_003,)]:
            assert len(set(world.run(cases.all_gather, shape, dtype))) == 1

    @pytest.mark.parametrize("dtype", ANY_DTYPES, ids=str)
    def test_broadcast_of_any_dtype_from_every_root(self, world: World, dtype: torch.dtype) -> None:
        for shape in [(), (5,), (400_003,)]:
            world.run(cases.broadcast, shape, dtype)

    def test_mixed_calls_with_ranks_out_of_step(self, world: World) -> None:
        assert len(set(world.run(cases.mixed_sequence))) == 1

    def test_calls_are_recorded_alike_on_all_ranks(self, world: World) -> None:
        first, *others = world.run(cases.recorded_calls)
        assert [what for _, *what in first] == [
            ["all_reduce", 400],
            ["all_reduce_max", 40],
            ["all_gather", 24],
            ["broadcast", 80],
            ["barrier", 0],
        ]
        assert all(other == first for other in others)

    def test_call_that_waits_is_recorded_without_end(self, world: World) -> None:
        *waiting, absent = world.run_alone(cases.record_of_a_waiting_call)
        assert absent == [("all_reduce", 12, True)]
        assert waiting == [[("all_reduce", 12, True), ("all_reduce", 28, False)]] * len(waiting)

    def test_inference_mode_may_change_between_calls(self, world: World) -> None:
        world.run(cases.inference_mode)

    def test_bad_arguments_are_refused_and_group_stays_usable(self, world: World) -> None:
        for messages in world.run(cases.refusals):
            assert "contiguous" in messages[0]
            assert "torch.bool" in messages[1]
            assert "meta" in messages[2]
            assert "all_gather out is" in messages[3]
            assert "overlaps" in messages[4]
            assert f"0..{world.size - 1}" in messages[5]

    def test_closed_group_refuses_calls(self, world: World) -> None:
        for message in world.run_alone(cases.join_and_close):
            assert "closed" in message

    def test_abort_frees_a_waiting_rank(self, world: World) -> None:
        outcomes = world.run_alone(cases.abort_while_waiting)
        for outcome, waited in outcomes[:-1]:
            assert outcome == "aborted, then refused"
            assert waited < cases.ABORT_TIMEOUT_S
