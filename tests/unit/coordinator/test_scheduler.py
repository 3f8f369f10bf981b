"""Given this state, expect this plan."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.scheduler import (
    Capacity,
    Chunk,
    Prefill,
    Rows,
    StepPlan,
    Victim,
    Waiting,
    plan_step,
)


def rows(*entries: tuple[int, int, int, int]) -> Rows:
    """Of (order, next position, final limit, blocks)."""
    columns = np.array(entries, dtype=np.int64).reshape(-1, 4).T
    return Rows(*columns)


def capacity(**changes: int) -> Capacity:
    values = {
        "num_free_blocks": 100,
        "num_free_slots": 8,
        "block_size": 4,
        "max_batch_tokens": 16,
        "watermark_blocks": 1,
    }
    return Capacity(**(values | changes))


def planned(
    rows: Rows, prefills: Sequence[Prefill], waiting: Iterable[Waiting], capacity: Capacity
) -> StepPlan:
    """A plan where no blocks are shared: whoever leaves frees all its blocks."""
    held = [*zip(rows.orders.tolist(), rows.num_blocks.tolist(), strict=True)]
    held += [(one.order, one.num_blocks) for one in prefills]
    victims = [Victim(order, count) for order, count in sorted(held, reverse=True)]
    return plan_step(rows, prefills, victims, waiting, capacity)


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert planned(rows(), [], [], capacity()).is_empty


def test_rows_take_their_tokens_first_and_prompts_the_rest() -> None:
    plan = planned(
        rows((1, 5, 20, 2), (2, 9, 20, 3)), [Prefill(3, 8, 40, 2)], [Waiting(4, 5)], capacity()
    )
    assert plan.num_rows == 2
    assert plan.chunks == [Chunk(3, 8, 14, 4)]


def test_prompts_share_a_step_first_come_first_served() -> None:
    plan = planned(
        rows(), [Prefill(1, 4, 6, 2)], [Waiting(2, 5), Waiting(3, 30), Waiting(4, 1)], capacity()
    )
    assert plan.chunks == [
        Chunk(1, 4, 2, 0),
        Chunk(2, 0, 5, 2, is_admission=True),
        Chunk(3, 0, 9, 3, is_admission=True),
    ]


def test_a_row_gets_a_block_when_its_position_needs_one() -> None:
    plan = planned(rows((1, 7, 20, 2), (2, 8, 20, 2)), [], [], capacity())
    assert plan.row_blocks == [(2, 1)]


def test_a_row_gets_no_block_for_positions_beyond_its_final_limit() -> None:
    plan = planned(rows((1, 7, 8, 2)), [], [], capacity(num_steps=4))
    assert plan.row_blocks == []


def test_several_steps_need_blocks_for_all_their_positions() -> None:
    plan = planned(rows((1, 7, 99, 2)), [], [], capacity(num_steps=6))
    assert plan.row_blocks == [(1, 2)]


def test_no_more_steps_are_granted_than_some_row_has_positions_for() -> None:
    plan = planned(rows((1, 7, 8, 2), (2, 5, 8, 2)), [], [], capacity(num_steps=8))
    assert plan.num_steps == 3
    assert planned(rows(), [], [Waiting(1, 2)], capacity(num_steps=8)).num_steps == 1


def test_nobody_loses_its_place_for_steps_granted_ahead() -> None:
    plan = planned(
        rows((1, 7, 99, 2), (2, 8, 99, 2)), [], [], capacity(num_steps=8, num_free_blocks=2)
    )
    assert (plan.num_steps, plan.preempted, plan.row_blocks) == (1, [], [(2, 1)])


def test_cached_tokens_take_neither_token_budget_nor_new_blocks() -> None:
    waiting = Waiting(2, 30, cached_blocks=[7, 8, 9, 10])
    plan = planned(rows((1, 5, 20, 2)), [], [waiting], capacity(max_batch_tokens=100))
    assert plan.chunks == [Chunk(2, 16, 14, 4, is_admission=True, cached_blocks=[7, 8, 9, 10])]


@pytest.mark.parametrize(("num_free", "is_admitted"), [(4, False), (5, True)])
def test_cached_blocks_that_nobody_owns_are_not_free_for_others(
    num_free: int, is_admitted: bool
) -> None:
    waiting = Waiting(2, 13, cached_blocks=[7, 8, 9], unowned_blocks=[8, 9])
    plan = planned(rows((1, 5, 20, 2)), [], [waiting], capacity(num_free_blocks=num_free - 1))
    assert bool(plan.chunks) == is_admitted  # one new, two taken over, one watermark


def test_two_that_take_over_the_same_cached_blocks_take_them_once() -> None:
    waiting = [Waiting(order, 13, True, [7, 8, 9], [7, 8, 9]) for order in (2, 3, 4)]
    plan = planned(rows(), [], waiting, capacity(num_free_blocks=6))
    assert [chunk.order for chunk in plan.chunks] == [2, 3]  # 3 + 1, then 1, then a watermark


def test_who_leaves_frees_only_the_blocks_that_nobody_else_has() -> None:
    given_rows = rows((1, 8, 20, 2), (2, 5, 20, 2), (3, 5, 20, 2))
    victims = [Victim(3, 0), Victim(2, 2), Victim(1, 2)]
    plan = plan_step(given_rows, [], victims, [], capacity(num_free_blocks=0))
    assert (plan.preempted, plan.row_blocks, plan.num_rows) == ([3, 2], [(1, 1)], 1)


def test_without_blocks_the_youngest_loses_its_place_and_nobody_is_admitted() -> None:
    plan = planned(
        rows((3, 5, 20, 2), (1, 8, 20, 2), (2, 5, 20, 2)),
        [],
        [Waiting(4, 1)],
        capacity(num_free_blocks=0),
    )
    assert (plan.preempted, plan.row_blocks) == ([3], [(1, 1)])
    assert (plan.num_rows, plan.chunks) == (2, [])


def test_a_prefill_is_preempted_before_older_rows() -> None:
    plan = planned(
        rows((1, 8, 20, 2), (2, 8, 20, 2)), [Prefill(5, 4, 40, 1)], [], capacity(num_free_blocks=0)
    )
    assert plan.preempted == [5, 2]
    assert (plan.row_blocks, plan.num_rows, plan.chunks) == ([(1, 1)], 1, [])


def test_the_youngest_gives_up_its_own_place_rather_than_an_older_ones() -> None:
    plan = planned(rows((1, 5, 20, 2), (2, 8, 20, 2)), [], [], capacity(num_free_blocks=0))
    assert (plan.preempted, plan.row_blocks, plan.num_rows) == ([2], [], 1)


def test_the_oldest_is_never_preempted() -> None:
    with pytest.raises(AssertionError, match="does not fit alone"):
        planned(rows((1, 8, 20, 2)), [], [], capacity(num_free_blocks=0))


def test_a_prompt_stops_where_the_blocks_end_and_nobody_younger_goes_first() -> None:
    plan = planned(
        rows((1, 5, 20, 2)), [Prefill(2, 6, 40, 2)], [Waiting(3, 1)], capacity(num_free_blocks=1)
    )
    assert plan.chunks == [Chunk(2, 6, 6, 1)]
    stuck = planned(
        rows((1, 5, 20, 2)), [Prefill(2, 8, 40, 2)], [Waiting(3, 1)], capacity(num_free_blocks=0)
    )
    assert stuck.chunks == [] and not stuck.is_empty


@pytest.mark.parametrize(("num_free", "is_admitted"), [(3, False), (4, True)])
def test_admission_leaves_a_watermark_while_others_run(num_free: int, is_admitted: bool) -> None:
    plan = planned(rows((1, 5, 20, 2)), [], [Waiting(2, 9)], capacity(num_free_blocks=num_free))
    assert bool(plan.chunks) == is_admitted


def test_an_empty_batch_admits_what_only_just_fits() -> None:
    plan = planned(rows(), [], [Waiting(2, 12)], capacity(num_free_blocks=3))
    assert plan.chunks == [Chunk(2, 0, 12, 3, is_admission=True)]


def test_a_preempted_request_waits_for_its_last_result_and_nobody_passes_it() -> None:
    plan = planned(rows(), [], [Waiting(2, 3, is_ready=False), Waiting(3, 3)], capacity())
    assert plan.is_empty


def test_the_queue_is_read_no_further_than_needed() -> None:
    read = []

    def waiting() -> Iterator[Waiting]:
        for order in range(1000):
            read.append(order)
            yield Waiting(order, 8)

    planned(rows(), [], waiting(), capacity())
    assert len(read) == 2


@given(
    entries=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), max_size=6),
    prefill=st.none() | st.tuples(st.integers(0, 20), st.integers(1, 20)),
    prompts=st.lists(st.integers(1, 60), max_size=5),
    num_free=st.integers(0, 12),
    num_steps=st.integers(1, 5),
)
def test_no_plan_gives_away_more_than_there_is(
    entries: list[tuple[int, int]],
    prefill: tuple[int, int] | None,
    prompts: list[int],
    num_free: int,
    num_steps: int,
) -> None:
    made = [
        (order, start, start + more, -(-start // 4)) for order, (start, more) in enumerate(entries)
    ]
    made = [(order, start, end, blocks) for order, start, end, blocks in made if blocks]
    prefills = []
    if prefill:
        num_prefilled, left = prefill
        prefills = [Prefill(50, num_prefilled, num_prefilled + left, -(-num_prefilled // 4))]
    held = sum(blocks for *_, blocks in made) + sum(one.num_blocks for one in prefills)
    if made and num_free + held < -(-max(end for _, _, end, _ in made) // 4):
        num_free += 100  # what cannot fit alone is refused on arrival
    waiting = [Waiting(100 + index, length) for index, length in enumerate(prompts)]
    given_rows = rows(*made)
    before = [column.copy() for column in vars(given_rows).values()]
    plan = planned(
        given_rows,
        prefills,
        waiting,
        capacity(num_free_blocks=num_free, num_free_slots=2, num_steps=num_steps),
    )
    for column, copy in zip(vars(given_rows).values(), before, strict=True):
        assert (column == copy).all()
    blocks_of = {order: blocks for order, _, _, blocks in made}
    blocks_of |= {one.order: one.num_blocks for one in prefills}
    freed = sum(blocks_of[order] for order in plan.preempted)
    given_out = sum(count for _, count in plan.row_blocks)
    given_out += sum(chunk.num_new_blocks for chunk in plan.chunks)
    assert given_out <= num_free + freed
    assert plan.num_rows + sum(chunk.length for chunk in plan.chunks) <= 16
    named = [*plan.preempted, *(chunk.order for chunk in plan.chunks)]
    assert len(set(named)) == len(named)
    if made:
        assert min(order for order, *_ in made) not in plan.preempted
    covered = blocks_of | {order: blocks_of[order] + count for order, count in plan.row_blocks}
    assert 1 <= plan.num_steps <= num_steps
    for order, start, end, _ in made:
        if order not in plan.preempted:
            assert covered[order] * 4 >= min(start + plan.num_steps, end)


def test_rows_at_their_limit_and_rows_that_lose_their_place_are_not_active() -> None:
    entries = ((1, 5, 20, 2), (2, 7, 7, 2), (3, 8, 20, 2))
    assert planned(rows(*entries), [], [], capacity()).num_active == 2
    plan = planned(rows(*entries), [], [], capacity(num_free_blocks=0))
    assert (plan.preempted, plan.num_active) == ([3], 1)
