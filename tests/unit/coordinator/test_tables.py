"""Rows without holes, slots, and the digest that both sides compute."""

import hashlib
import struct

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from coordinator.request import Request, Sampling
from coordinator.tables import RowTable, SlotTable, table_digest
from protos.lockstep.v1 import generate_pb2

SAMPLING = Sampling(0.0, 0, 1.0, 0.0, 7, 1.0, 0.0, 0.0, 0, (), -1)


def make_prefilled(order: int, slot: int, prompt_len: int = 3, max_tokens: int = 9) -> Request:
    prompt = np.zeros(prompt_len, dtype=np.int32)
    request = Request(order, 0, order, str(order), prompt, max_tokens, SAMPLING, 0.0)
    request.open_slot(slot)
    request.num_prefilled = request.prefill_len
    return request


@given(st.lists(st.integers(0, 20), max_size=40))
def test_changes_alone_keep_a_copy_of_the_rows_equal(history: list[int]) -> None:
    table = RowTable(32)
    copy: dict[int, int] = {}
    for order, choice in enumerate(history):
        if choice < 10 or not table.num_rows:
            table.append(make_prefilled(order, slot=order + 1))
        else:
            table.remove(table.requests[choice % table.num_rows])
        if choice % 3:
            continue  # several changes in one command
        copy |= dict(table.take_changes())
        in_use = {row: slot for row, slot in copy.items() if slot}
        assert in_use == {row: request.slot for row, request in enumerate(table.requests)}
        assert table.orders.tolist() == [request.order for request in table.requests]
        assert [request.row for request in table.requests] == list(range(table.num_rows))


def test_removing_a_row_moves_the_last_one_and_nothing_else() -> None:
    table = RowTable(4)
    requests = [make_prefilled(order, slot=order + 1) for order in range(3)]
    for request in requests:
        table.append(request)
    table.take_changes()
    table.remove(requests[0])
    assert table.take_changes() == [(0, 3), (2, 0)]
    assert requests[0].row == -1


def test_advancing_stops_at_the_final_limit() -> None:
    table = RowTable(4)
    table.append(make_prefilled(0, 1, prompt_len=3, max_tokens=3))
    table.append(make_prefilled(1, 2, prompt_len=3, max_tokens=9))
    table.advance(4)
    assert table.next_positions.tolist() == [5, 7]


def test_a_closed_slot_is_free_at_once_and_named_once() -> None:
    slots = SlotTable(2)
    first = slots.take()
    slots.put(make_prefilled(0, first))
    assert (first, slots.num_free_slots) == (1, 1)
    slots.close(first)
    assert slots.take() == 1
    assert slots.take_closed() == [1]
    assert slots.take_closed() == []


def test_slots_of_constrained_requests_are_counted() -> None:
    slots = SlotTable(2)
    free, bound = (make_prefilled(order, slots.take()) for order in range(2))
    bound.constraint = generate_pb2.SamplingParams(regex="a")
    for request in (free, bound):
        slots.put(request)
        slots.check()
    assert slots.num_constrained == 1
    slots.close(bound.slot)
    assert slots.num_constrained == 0


def test_the_digest_is_the_one_of_the_protocol() -> None:
    one, two = make_prefilled(0, 5), make_prefilled(1, 2, prompt_len=4)
    one.limit, one.block_ids = 8, [7, 3]
    two.limit, two.block_ids = 4, [9]
    # row_count, slots of the rows; then slot, prompt_len, prefill_len, limit, num_blocks, blocks.
    words = [2, 5, 2, *(2, 4, 4, 4, 1, 9), *(5, 3, 3, 8, 2, 7, 3)]
    packed = struct.pack(f"<{len(words)}i", *words)
    wanted = hashlib.blake2b(packed, digest_size=32).digest()[:8]
    assert table_digest([5, 2], [two, one]) == wanted
    two.limit = 3
    assert table_digest([5, 2], [two, one]) != wanted
