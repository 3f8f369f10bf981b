"""Commands become the right tokens: prefill, rows, limits, stops, preemption, bad logits."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from protos.lockstep.v1.worker_pb2 import EngineConfig, SlotOpen, TableDelta
from tests.helpers.command_maker import CommandMaker, packed
from tests.helpers.tiny_models import write_tiny_model
from worker.chunk_tokens import ChunkShape, pack_chunks, view_chunks
from worker.config import WorkerConfig
from worker.errors import CommandRefused
from worker.executor import StepExecutor
from worker.kernels.advance import FLAG_NOT_FINITE, FLAG_STOP
from worker.models.spec import load_model_spec
from worker.rank import Rank
from worker.sampling_params import SlotParams
from worker.tables import Chunk, Sequence

BLOCK = 4
PROMPT = [5, 9, 200, 31, 77, 8, 150]
NUM_BLOCKS = 40


class Commands:
    """Numbers and digests commands for an executor, as a coordinator does."""

    def __init__(self, executor: StepExecutor) -> None:
        self._executor = executor
        self._maker = CommandMaker(epoch=1)

    def run(self, delta: TableDelta, steps: int = 1) -> list[list[tuple[int, int]]]:
        """(token id, flags) of every entry of every step."""
        command = self._maker.next(delta, steps)
        results = []
        for pending in self._executor.execute(command, arrived=0.0):
            pending.wait()
            token_ids = pending.tensors["token_ids"][pending.entries].tolist()
            flags = pending.tensors["flags"][pending.entries].tolist()
            results.append(list(zip(token_ids, flags, strict=True)))
        return results

    def decode(self, row_slots: list[int], steps: int) -> list[list[int]]:
        """Puts slots into rows 0..n-1 and returns the tokens of each step."""
        changes = [number for row, slot in enumerate(row_slots) for number in (row, slot)]
        delta = TableDelta(row_changes=packed(*changes), row_count=len(row_slots))
        return [[token for token, _ in step] for step in self.run(delta, steps)]


def opening(slot: int, limit: int = 40, **fields: Any) -> SlotOpen:
    values: dict[str, Any] = {
        "prompt_len": len(PROMPT),
        "prefill_len": len(PROMPT),
        "block_ids": packed(*range(slot * 10 + 9, slot * 10 - 1, -1)),
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "logprob_count": -1,
    }
    return SlotOpen(slot=slot, limit=limit, **{**values, **fields})


def prefill(slot_open: SlotOpen, token_ids: list[int]) -> TableDelta:
    return TableDelta(
        opened_slots=[slot_open],
        chunks=packed(slot_open.slot, 0, len(token_ids)),
        chunk_token_ids=packed(*token_ids),
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def rank(model_dir: Path) -> Iterator[Rank]:
    config = WorkerConfig(model_dir, "cpu", "127.0.0.1", 0, 0, 1, "", "", "text")
    with torch.no_grad():
        made = Rank(config, load_model_spec(model_dir))
        made.load(engine_config())
        made.join(b"", timeout_s=10)
        yield made


def engine_config() -> EngineConfig:
    return EngineConfig(
        dtype="float32",
        block_size=BLOCK,
        max_num_seqs=3,
        max_batch_tokens=64,
        max_model_len=80,
        load_format="safetensors",
        comm="shm",
        kv_cache_bytes=1 << 24,
    )


@pytest.fixture
def commands(rank: Rank) -> Commands:
    rank.capture()
    rank.init_kv_cache(NUM_BLOCKS, epoch=1)
    assert rank.executor is not None
    return Commands(rank.executor)


@pytest.fixture(scope="module")
def greedy(model_dir: Path) -> list[int]:
    """30 tokens that transformers chooses after PROMPT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir).eval()
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(30):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_whole_prompt_then_rows_give_the_greedy_continuation(
    commands: Commands, greedy: list[int]
) -> None:
    first = commands.run(prefill(opening(1), PROMPT))
    rest = commands.decode([1], steps=12)
    assert [first[0][0][0], *(step[0] for step in rest)] == greedy[:13]


def test_chunks_beside_decoding_rows_change_no_token(commands: Commands, greedy: list[int]) -> None:
    commands.run(prefill(opening(1), PROMPT))
    commands.decode([1], steps=2)
    mixed = TableDelta(
        opened_slots=[opening(2)],
        chunks=packed(2, 0, 3),
        chunk_token_ids=packed(*PROMPT[:3]),
        row_count=1,
    )
    assert commands.run(mixed) == [[(greedy[3], 0)]]
    last = TableDelta(chunks=packed(2, 3, 4), chunk_token_ids=packed(*PROMPT[3:]), row_count=1)
    assert commands.run(last) == [[(greedy[4], 0), (greedy[0], 0)]]
    assert commands.decode([1, 2], steps=1) == [[greedy[5], greedy[1]]]


def test_row_at_its_limit_is_inert_until_the_limit_rises(
    commands: Commands, greedy: list[int]
) -> None:
    commands.run(prefill(opening(1, limit=len(PROMPT) + 2), PROMPT))
    assert commands.decode([1], steps=4) == [[greedy[1]], [greedy[2]], [-1], [-1]]
    raised = TableDelta(limits=packed(1, len(PROMPT) + 3), row_count=1)
    assert commands.run(raised, steps=2) == [[(greedy[3], 0)], [(-1, 0)]]


def test_rows_go_inert_one_by_one_within_a_command_of_eight_steps(
    commands: Commands, greedy: list[int]
) -> None:
    for slot, limit in ((1, 2), (2, 5), (3, 40)):
        commands.run(prefill(opening(slot, limit=min(len(PROMPT) + limit, 40)), PROMPT))
    steps = commands.decode([1, 2, 3], steps=8)
    for row, count in enumerate((2, 5, 8)):
        expected = greedy[1 : 1 + count] + [-1] * (8 - count)
        assert [step[row] for step in steps] == expected


def test_chunks_of_a_command_run_in_its_first_step_alone(
    commands: Commands, greedy: list[int]
) -> None:
    commands.run(prefill(opening(1), PROMPT))
    commands.decode([1], steps=1)
    mixed = prefill(opening(2), PROMPT)
    mixed.row_count = 1
    steps = commands.run(mixed, steps=3)
    assert [[token for token, _ in step] for step in steps] == [
        [greedy[2], greedy[0]],
        [greedy[3]],
        [greedy[4]],
    ]
    assert commands.decode([1, 2], steps=2) == [[greedy[5], greedy[1]], [greedy[6], greedy[2]]]


def test_time_in_collectives_is_measured_from_the_epoch_on(rank: Rank, commands: Commands) -> None:
    assert rank.executor is not None and rank.comm is not None
    assert rank.executor.comm_seconds == 0.0
    rank.comm.stats.seconds = 0.25
    assert rank.executor.comm_seconds == pytest.approx(0.25)


def test_row_that_chose_a_stop_id_says_so_and_goes_inert(
    commands: Commands, greedy: list[int]
) -> None:
    stop = next(token for token in greedy[1:] if token != greedy[0])
    index = greedy.index(stop)
    commands.run(prefill(opening(1, stop_ids=packed(stop)), PROMPT))
    delta = TableDelta(row_changes=packed(0, 1), row_count=1)
    steps = commands.run(delta, steps=index + 2)
    assert steps[index - 1 :] == [[(stop, FLAG_STOP)], [(-1, 0)], [(-1, 0)]]


def test_min_tokens_keeps_the_stop_id_from_being_chosen(
    commands: Commands, greedy: list[int]
) -> None:
    held = opening(1, stop_ids=packed(greedy[0]), min_tokens=2)
    first = commands.run(prefill(held, PROMPT))[0][0]
    assert first[0] != greedy[0] and not first[1] & FLAG_STOP


def test_bias_moves_the_choice_and_a_bad_word_is_kept_out_within_one_command(
    commands: Commands, greedy: list[int]
) -> None:
    biased = opening(1, bias_ids=packed(99), bias_values=struct.pack("<f", 1e5))
    assert commands.run(prefill(biased, PROMPT)) == [[(99, 0)]]
    without = opening(2, bad_words=[packed(*greedy[1:3])])
    commands.run(prefill(without, PROMPT))
    outputs = [step[0] for step in commands.decode([2], steps=8)]
    assert outputs[0] == greedy[1] and outputs[1] != greedy[2]
    assert (greedy[1], greedy[2]) not in itertools.pairwise([greedy[0], *outputs])


def test_constrained_row_takes_one_token_per_mask_while_its_neighbour_goes_on(
    commands: Commands, greedy: list[int]
) -> None:
    limit = len(PROMPT)
    commands.run(prefill(opening(1), PROMPT))
    first = prefill(opening(2, limit=limit, is_constrained=True), PROMPT)
    first.masks.add(slot=2, ids=packed(7, 9))
    assert commands.run(first)[0][-1][0] in (7, 9)
    assert [step[1] for step in commands.decode([1, 2], steps=2)] == [-1, -1]
    delta = TableDelta(limits=packed(2, limit + 1), row_count=2)
    delta.masks.add(slot=2, ids=packed(3))
    assert commands.run(delta, steps=3) == [
        [(greedy[3], 0), (3, 0)],
        [(greedy[4], 0), (-1, 0)],
        [(greedy[5], 0), (-1, 0)],
    ]


def test_mask_that_allows_nothing_ends_its_own_row_only(
    commands: Commands, greedy: list[int]
) -> None:
    commands.run(prefill(opening(1), PROMPT))
    nothing = prefill(opening(2, is_constrained=True), PROMPT)
    nothing.masks.add(slot=2, ids=b"")
    assert commands.run(nothing) == [[(-1, FLAG_NOT_FINITE)]]
    assert commands.decode([1], steps=1) == [[greedy[1]]]


@pytest.mark.parametrize("penalty", [{}, {"repetition_penalty": 1.3, "frequency_penalty": 0.7}])
def test_sequence_prefilled_again_after_preemption_goes_on_with_the_same_tokens(
    commands: Commands, penalty: dict[str, float]
) -> None:
    sampled: dict[str, Any] = {"temperature": 0.9, "seed": 42, **penalty}
    first = commands.run(prefill(opening(1, **sampled), PROMPT))[0][0][0]
    outputs = [first, *(step[0] for step in commands.decode([1], steps=9))]
    again = [*PROMPT, *outputs[:5]]
    resumed = TableDelta(
        closed_slots=packed(1),
        opened_slots=[opening(2, prefill_len=len(again), **sampled)],
        chunks=packed(2, 0, len(again)),
        chunk_token_ids=packed(*again),
        row_changes=packed(0, 0),
        row_count=0,
    )
    sixth = commands.run(resumed)[0][0][0]
    assert [sixth, *(step[0] for step in commands.decode([2], steps=4))] == outputs[5:]


def test_neighbours_of_other_kinds_change_no_token(commands: Commands, greedy: list[int]) -> None:
    commands.run(prefill(opening(1), PROMPT))
    commands.run(prefill(opening(2, temperature=1.0, top_p=0.5, seed=1), PROMPT))
    commands.run(prefill(opening(3, temperature=1.0, top_k=5, logprob_count=3), PROMPT))
    assert [step[0] for step in commands.decode([1, 2, 3], steps=6)] == greedy[1:7]


def test_bad_logits_end_their_own_row_only(
    rank: Rank, commands: Commands, greedy: list[int]
) -> None:
    commands.run(prefill(opening(1), PROMPT))
    commands.run(prefill(opening(2), PROMPT))
    assert rank.executor is not None
    cache = rank.executor._runner.kv_cache
    key, _ = cache.layer(0)
    key[29] = torch.nan  # the first block of slot 2
    delta = TableDelta(row_changes=packed(0, 1, 1, 2), row_count=2)
    steps = commands.run(delta, steps=2)
    assert steps == [[(greedy[1], 0), (-1, FLAG_NOT_FINITE)], [(greedy[2], 0), (-1, 0)]]


def test_refused_command_launches_nothing(commands: Commands, greedy: list[int]) -> None:
    commands.run(prefill(opening(1), PROMPT))
    with pytest.raises(CommandRefused, match="not open"):
        commands.run(TableDelta(limits=packed(2, 3)))


def test_rank_reused_by_the_next_epoch_keeps_its_weights(rank: Rank) -> None:
    rank.load(engine_config())
    loaded = rank.loaded
    rank.load(engine_config())
    assert rank.loaded is loaded
    other = engine_config()
    other.dtype = "bfloat16"
    rank.load(other)
    assert rank.loaded is not loaded
    rank.load(engine_config())


def test_padding_of_a_mixed_step_changes_no_logit(rank: Rank, commands: Commands) -> None:
    commands.run(prefill(opening(1), PROMPT))
    commands.decode([1], steps=2)
    executor = rank.executor
    assert executor is not None
    runner, blocks = executor._runner, list(range(29, 19, -1))
    sequence = Sequence(2, len(PROMPT), len(PROMPT), 40, blocks, SlotParams())
    chunks = [Chunk(sequence, 0, np.asarray(PROMPT, np.int32))]
    # Slot 2's blocks on the device; its row stays empty.
    runner.tables.block_table[2, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    exact, padded = ChunkShape.of(chunks), ChunkShape(num_chunks=3, num_finals=2, num_tokens=16)
    logits = {}
    for shape, num_rows in ((exact, 1), (padded, 3)):
        packed_chunks = torch.from_numpy(pack_chunks(chunks, BLOCK, shape))
        tokens = view_chunks(packed_chunks, shape, chunks)
        logits[num_rows] = runner.mixed_forward(num_rows, tokens)
    assert logits[3].shape[0] == 3 + 2
    torch.testing.assert_close(logits[3][[0, 3]], logits[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits[3][4], logits[1][1], atol=1e-3)
