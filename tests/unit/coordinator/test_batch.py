"""Histories of a batch against a rank that computes: planned ahead, stopped, preempted, ended."""

import struct
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.batch import Batch
from coordinator.errors import ProtocolBroken
from coordinator.request import Request, RequestState
from protos.lockstep.v1 import generate_pb2, worker_pb2
from tests.helpers.batch_history import Rank, apply, make_batch, make_request
from tests.helpers.fake_worker import expected_output


class History:
    """A batch, the rank that runs its commands, and what every request must get."""

    def __init__(self, batch: Batch, arrivals: list[tuple[int, int, bool]]) -> None:
        self.batch = batch
        self.rank = Rank(batch)
        self.pending = deque(arrivals)
        self.requests: list[Request] = []
        self.wanted: list[list[int]] = []
        self.cancelled: set[int] = set()
        self.unreported: deque[worker_pb2.StepResult] = deque()

    def arrive(self) -> None:
        if not self.pending:
            return
        prompt_len, max_tokens, stops = self.pending.popleft()
        order = len(self.requests)
        prompt = [(order * 31 + index) % 1000 for index in range(prompt_len)]
        alone = expected_output(prompt, max_tokens)
        stop_ids = (alone[len(alone) // 2],) if stops else ()
        self.wanted.append(expected_output(prompt, max_tokens, stop_ids))
        self.requests.append(make_request(order, prompt, max_tokens, stop_ids))
        self.batch.enqueue(self.requests[-1])

    def cancel(self) -> None:
        if self.requests and not self.requests[-1].is_finished:
            self.cancelled.add(self.requests[-1].order)
            self.batch.finish(self.requests[-1])

    def send(self) -> None:
        if len(self.unreported) < 3 and (command := self.batch.next_command(True)) is not None:
            self.unreported += self.rank.run(command)

    def report(self) -> None:
        if self.unreported:
            apply(self.batch, self.unreported.popleft())


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 5),
    arrivals=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 20), st.booleans()), min_size=1, max_size=12
    ),
    moves=st.lists(st.sampled_from(["arrive", "arrive", "cancel", "send", "report"]), max_size=60),
)
def test_any_history_gives_every_request_the_tokens_that_it_gets_alone(
    seed: int, arrivals: list[tuple[int, int, bool]], moves: list[str]
) -> None:
    history = History(make_batch(seed=seed), arrivals)
    batch = history.batch
    for move in [*moves, *(["arrive"] * len(arrivals))]:
        getattr(history, move)()
        batch.check()
    for _ in range(5000):
        if all(request.is_finished for request in history.requests) and not history.unreported:
            break
        history.send()
        history.report()
        batch.check()
    for request, tokens in zip(history.requests, history.wanted, strict=True):
        assert request.is_finished
        if request.order in history.cancelled:
            tokens = tokens[: len(request.output_ids)]
        assert request.output_ids == tokens
    assert batch.allocator.num_free_blocks == batch.allocator.num_usable_blocks
    assert batch.slots.num_free_slots == batch.limits.max_num_seqs


def test_a_preempted_request_keeps_tokens_in_flight_and_waits_for_the_last_of_them() -> None:
    batch = make_batch(num_blocks=7)
    rank = Rank(batch)
    old, young = make_request(1, [1] * 7, 16), make_request(2, [2] * 7, 16)
    batch.enqueue(old)
    batch.enqueue(young)
    unreported: deque[worker_pb2.StepResult] = deque()
    while young.state is not RequestState.PREEMPTED:
        command = batch.next_command(with_table_digest=True)
        assert command is not None
        unreported += rank.run(command)
        if len(unreported) > 2:
            apply(batch, unreported.popleft())
    had = len(young.output_ids)
    assert unreported and not next(iter(batch._waiting_views())).is_ready
    while batch.last_reported_step < young.ready_after_step:
        apply(batch, unreported.popleft())
    assert len(young.output_ids) > had
    assert next(iter(batch._waiting_views())).is_ready
    assert young.output_ids == expected_output([2] * 7, len(young.output_ids))


def test_the_last_row_leaves_before_its_results_have_come() -> None:
    batch = make_batch()
    rank = Rank(batch)
    request = make_request(1, [5], 2)
    batch.enqueue(request)
    results = []
    while (command := batch.next_command(with_table_digest=True)) is not None:
        results += rank.run(command)
    assert request.state is RequestState.COMPLETING and len(results) == 2
    assert batch.allocator.num_free_blocks == batch.allocator.num_usable_blocks
    for result in results:
        apply(batch, result)
    assert request.output_ids == expected_output([5], 2)


def test_a_heartbeat_carries_what_was_closed() -> None:
    batch = make_batch()
    rank = Rank(batch)
    batch.enqueue(make_request(1, [5], 1))
    command = batch.next_command(with_table_digest=True)
    assert command is not None
    rank.run(command)
    assert batch.next_command() is None
    beat = worker_pb2.ExecuteRequest.FromString(batch.heartbeat_command()).command
    assert (beat.command_id, beat.first_step, beat.step_count) == (2, 2, 0)
    delta = worker_pb2.TableDelta.FromString(beat.delta)
    assert struct.unpack("<i", delta.closed_slots) == (1,)


def masked(batch: Batch, request: Request, *allowed: int) -> None:
    """The request's next mask comes."""
    request.next_mask = worker_pb2.SlotMask(ids=struct.pack(f"<{len(allowed)}i", *allowed))
    batch.mask_came(request)


def constrained(order: int, max_tokens: int) -> Request:
    constraint = generate_pb2.SamplingParams(regex="any")
    return make_request(order, [7], max_tokens, constraint=constraint)


def test_a_constrained_row_takes_a_token_a_mask_and_the_others_keep_their_grants() -> None:
    batch = make_batch(num_blocks=40)
    rank = Rank(batch)
    free, bound = make_request(1, [5], 40), constrained(2, 4)
    batch.enqueue(free)
    batch.await_mask(bound)
    assert batch.num_waiting == 2
    run(batch, rank)
    assert batch.num_running == 1, "without a mask it must not begin"
    masked(batch, bound, 11)
    run(batch, rank)  # its prompt
    for number, token in enumerate((11, 12, 13), start=1):
        assert bound.output_ids[-1] == token and len(bound.output_ids) == number
        before = len(free.output_ids)
        run(batch, rank, max_steps=4)
        assert len(free.output_ids) == before + 4 and len(bound.output_ids) == number
        masked(batch, bound, token + 1)
        run(batch, rank, max_steps=4)
        assert len(free.output_ids) == before + 8
    assert bound.output_ids == [11, 12, 13, 14] and bound.is_finished


def test_nothing_is_granted_while_every_row_waits_for_its_mask() -> None:
    batch = make_batch()
    rank = Rank(batch)
    bound = constrained(1, 3)
    batch.await_mask(bound)
    assert batch.next_command() is None
    masked(batch, bound, 11)
    run(batch, rank)
    assert batch.next_command(max_steps=8) is None
    masked(batch, bound, 12)
    run(batch, rank, max_steps=8)
    assert batch.last_step == 2 and bound.output_ids == [11, 12]


def test_nobody_waits_behind_a_preempted_request_whose_mask_is_being_made() -> None:
    batch = make_batch(num_blocks=7)
    rank = Rank(batch)
    old, bound, behind = make_request(1, [1] * 7, 16), constrained(2, 3), make_request(3, [3], 2)
    batch.enqueue(old)
    batch.await_mask(bound)
    masked(batch, bound, 11)
    while bound.state is not RequestState.PREEMPTED:
        run(batch, rank)
    assert bound.output_ids == [11] and batch.num_waiting == 1 and batch.num_running == 1
    batch.finish(old)
    batch.enqueue(behind)
    run(batch, rank)
    assert behind.output_ids == expected_output([3], 1), "it had room and needed no mask"
    masked(batch, bound, 12)
    run(batch, rank)
    masked(batch, bound, 13)
    run(batch, rank)
    assert bound.output_ids == [11, 12, 13] and bound.is_finished and behind.is_finished


def test_a_preempted_request_may_end_before_its_mask_comes() -> None:
    batch = make_batch(num_blocks=7)
    rank = Rank(batch)
    bound = constrained(2, 3)
    batch.enqueue(make_request(1, [1] * 7, 16))
    batch.await_mask(bound)
    masked(batch, bound, 11)
    while bound.state is not RequestState.PREEMPTED:
        run(batch, rank)
    batch.finish(bound)
    batch.check()
    assert bound.is_finished and batch.num_waiting == 0


def test_a_request_may_end_before_its_first_mask_comes() -> None:
    batch = make_batch()
    bound = constrained(1, 3)
    batch.await_mask(bound)
    batch.finish(bound)
    assert bound.is_finished and batch.num_waiting == 0


def run(batch: Batch, rank: Rank, max_steps: int = 1) -> None:
    command = batch.next_command(with_table_digest=True, max_steps=max_steps)
    assert command is not None
    for result in rank.run(command):
        apply(batch, result)
    batch.check()


def granted(batch: Batch, rank: Rank, max_steps: int) -> tuple[int, int]:
    """Steps and chunks of the next command, which is run."""
    before = batch.last_step
    run(batch, rank, max_steps)
    return batch.last_step - before, len(rank.deltas[-1].chunks) // 12


def decoding_batch() -> tuple[Batch, Rank]:
    """One sequence decodes, and nobody has begun for a while."""
    batch = make_batch(num_blocks=400, max_num_seqs=8)
    rank = Rank(batch)
    batch.enqueue(make_request(1, [5], 500))
    assert [granted(batch, rank, 8) for _ in range(3)] == [(1, 1), (8, 0), (8, 0)]
    return batch, rank


def test_who_comes_alone_decodes_from_the_next_step_on() -> None:
    batch, rank = decoding_batch()
    batch.enqueue(make_request(2, [2], 100))
    assert [granted(batch, rank, 4) for _ in range(2)] == [(1, 1), (4, 0)]
    assert rank.deltas[-1].row_count == 2


def test_who_comes_behind_others_begins_at_once_and_decodes_after_a_long_grant() -> None:
    batch, rank = decoding_batch()
    counts = []
    for order in (2, 3, 4, 5):
        batch.enqueue(make_request(order, [order], 100))
        counts.append(granted(batch, rank, 4))
    assert counts == [(1, 1), (4, 1), (4, 1), (4, 1)]
    assert rank.deltas[-1].row_count == 4  # all but the newest
    # Nobody for two grants, in which all that have come decode: the next one is alone again.
    assert [granted(batch, rank, 8) for _ in range(2)] == [(8, 0), (8, 0)]
    batch.enqueue(make_request(6, [6], 100))
    assert granted(batch, rank, 4) == (1, 1)


def test_the_rest_of_a_prompt_goes_on_with_the_next_step() -> None:
    batch, rank = decoding_batch()  # 12 tokens a step
    batch.enqueue(make_request(2, [2], 100))
    batch.enqueue(make_request(3, [3] * 20, 100))
    batch.enqueue(make_request(4, [4] * 9, 100))
    counts = [granted(batch, rank, 4) for _ in range(4)]
    assert counts == [(1, 2), (1, 1), (4, 1), (4, 0)]


def test_a_prompt_that_does_not_end_with_its_first_piece_gets_one_step_behind_others() -> None:
    batch, rank = decoding_batch()
    batch.enqueue(make_request(2, [2], 100))
    assert granted(batch, rank, 4) == (1, 1)
    batch.enqueue(make_request(3, [3] * 20, 100))
    assert [granted(batch, rank, 4) for _ in range(3)] == [(1, 1), (1, 1), (4, 0)]


@pytest.mark.parametrize(("command_id", "step"), [(2, 2), (1, 2), (2, 1), (0, 0)])
def test_a_result_out_of_turn_is_refused(command_id: int, step: int) -> None:
    batch = make_batch()
    batch.enqueue(make_request(1, [5], 9))
    assert batch.next_command() and batch.next_command()
    with pytest.raises(ProtocolBroken, match="awaited: command 1 step 1"):
        batch.resolve(command_id, step)


def test_the_audit_finds_a_block_with_two_owners() -> None:
    batch = make_batch()
    one, two = make_request(1, [5], 9), make_request(2, [6], 9)
    batch.enqueue(one)
    batch.enqueue(two)
    assert batch.next_command()
    batch.check()
    two.block_ids[0] = one.block_ids[0]
    with pytest.raises(AssertionError):
        batch.check()
