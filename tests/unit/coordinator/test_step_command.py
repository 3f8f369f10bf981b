"""Commands decoded by a reader that shares no code with the writer."""

import hashlib
import struct
from dataclasses import replace

import numpy as np

from coordinator.request import Request, Sampling
from coordinator.step_command import (
    CommandEncoder,
    DeltaBuilder,
    pack_int32,
    slot_open,
    unpack_int32,
)
from protos.lockstep.v1 import worker_pb2

SAMPLING = Sampling(0.5, 4, 0.75, 0.25, -7, 1.5, 0.5, -0.5, 3, (8, 9), 2)


def ints(packed: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(packed) // 4}i", packed))


def make_request(slot: int) -> Request:
    prompt = np.array([11, 12, 13, 14, 15], dtype=np.int32)
    request = Request(1, 0, 1, "name", prompt, 6, SAMPLING, 0.0)
    request.open_slot(slot)
    return request


def test_a_delta_reads_back_as_it_was_meant() -> None:
    builder = DeltaBuilder()
    opened, grown = make_request(2), make_request(3)
    builder.open(opened, [7], block_size=4)
    grown.block_ids = [5]
    builder.append_blocks(grown, [8, 9], block_size=4)
    builder.add_chunk(opened, 0, 4)
    builder.add_chunk(grown, 2, 3)
    delta = worker_pb2.TableDelta.FromString(builder.build([6, 4], [(0, 3), (1, 0)], 1))
    assert ints(delta.closed_slots) == [6, 4]
    assert ints(delta.block_appends) == [3, 1, 8, 3, 2, 9]
    assert ints(delta.limits) == [3, 10]  # prompt 5 + output 6 - 1, below the 12 covered
    assert ints(delta.row_changes) == [0, 3, 1, 0]
    assert delta.row_count == 1
    assert ints(delta.chunks) == [2, 0, 4, 3, 2, 3]
    assert ints(delta.chunk_token_ids) == [11, 12, 13, 14, 13, 14, 15]
    (opening,) = delta.opened_slots
    assert (opening.slot, opening.prompt_len, opening.prefill_len) == (2, 5, 5)
    assert (opening.limit, ints(opening.block_ids)) == (4, [7])
    assert (opening.temperature, opening.top_k, opening.top_p, opening.min_p) == (
        0.5,
        4,
        0.75,
        0.25,
    )
    assert (opening.seed, opening.min_tokens, opening.logprob_count) == (-7, 3, 2)
    assert opening.repetition_penalty == 1.5
    assert (opening.presence_penalty, opening.frequency_penalty) == (0.5, -0.5)
    assert ints(opening.stop_ids) == [8, 9]


def test_biases_bad_words_and_the_outputs_before_a_slot_was_opened_are_sent() -> None:
    request = make_request(2)
    request.sampling = replace(SAMPLING, logit_bias=((3, 0.5), (8, -2.0)), bad_words=((1,), (4, 5)))
    request.output_ids = list(range(100, 120))
    request.prefill_len = 5 + 18
    opening = slot_open(request)
    assert ints(opening.bias_ids) == [3, 8]
    assert struct.unpack("<2f", opening.bias_values) == (0.5, -2.0)
    assert [ints(word) for word in opening.bad_words] == [[1], [4, 5]]
    assert ints(opening.recent_output_ids) == list(range(103, 118))
    request.output_ids, request.prefill_len = [], 5
    assert not slot_open(request).recent_output_ids


def test_commands_are_numbered_and_chained_from_eight_zero_bytes() -> None:
    encoder = CommandEncoder(epoch=5)
    digest = bytes(8)
    first_step = 1
    for number, num_steps in enumerate([1, 3, 0, 1], start=1):
        delta = bytes([number])
        sent = encoder.encode(delta, num_steps, b"t" if number == 2 else b"")
        command = worker_pb2.ExecuteRequest.FromString(sent).command
        digest = hashlib.blake2b(digest + delta, digest_size=32).digest()[:8]
        assert (command.command_id, command.epoch) == (number, 5)
        assert (command.first_step, command.step_count) == (first_step, num_steps)
        assert (command.delta, command.digest) == (delta, digest)
        assert command.table_digest == (b"t" if number == 2 else b"")
        first_step += num_steps


def test_packed_integers_are_little_endian() -> None:
    assert pack_int32([1, -2]) == b"\x01\0\0\0\xfe\xff\xff\xff"
    assert pack_int32([]) == b""
    assert unpack_int32(b"\x01\0\0\0\xfe\xff\xff\xff") == [1, -2]
