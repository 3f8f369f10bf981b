"""A long prompt beside decoding streams: what each command to the ranks holds."""

import asyncio
import struct

from protos.lockstep.v1 import worker_pb2
from tests.helpers.engine_harness import Harness, running_group
from tests.helpers.fake_worker import FakeSettings, expected_output

NUM_DECODING = 8
CHUNK = 25
NUM_CHUNKS = 16
LONG = 100


async def run_long_prompt_beside(group: Harness) -> None:
    """Eight streams decode; a prompt of sixteen chunks comes, is prefilled and gets one token."""
    handles = range(1, NUM_DECODING + 1)
    for handle in handles:
        group.submit(handle, [handle, 7], 300)
    await group.heard.until(lambda: all(len(group.heard.tokens.get(h, [])) > 2 for h in handles))
    group.submit(LONG, list(range(CHUNK * NUM_CHUNKS)), 1)
    await group.heard.end_of(LONG)
    assert not group.heard.ended.keys() & set(handles), "the streams were to decode on"


def mixed_commands(group: Harness, rank: int) -> list[tuple[int, int, int]]:
    """(steps, decoding rows, tokens prefilled) of each command with a chunk of the long prompt."""
    found = []
    for command in group.workers[rank].commands:
        delta = worker_pb2.TableDelta.FromString(command.delta)
        lengths = [length for _, _, length in struct.iter_unpack("<3i", delta.chunks)]
        if max(lengths, default=0) > 2:  # the streams' own prompts have two tokens
            found.append((command.step_count, delta.row_count, sum(lengths)))
    return found


def test_every_step_of_a_long_prefill_has_a_row_of_each_decoding_stream() -> None:
    async def run() -> None:
        settings = [FakeSettings(num_blocks=1024) for _ in range(2)]
        async with running_group(
            settings, max_num_seqs=NUM_DECODING + 1, max_batch_tokens=CHUNK + NUM_DECODING
        ) as group:
            await run_long_prompt_beside(group)
            for rank in range(2):
                assert mixed_commands(group, rank) == [(1, NUM_DECODING, CHUNK)] * NUM_CHUNKS
            prompt = list(range(CHUNK * NUM_CHUNKS))
            assert group.heard.tokens[LONG] == expected_output(prompt, 1)
            for handle in range(1, NUM_DECODING + 1):
                had = group.heard.tokens[handle]
                assert had == expected_output([handle, 7], 300)[: len(had)]

    asyncio.run(run())
