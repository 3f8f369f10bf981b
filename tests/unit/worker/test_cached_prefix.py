"""A slot opened over cached blocks gives what a slot gives that was prefilled from 0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from protos.lockstep.v1.worker_pb2 import EngineConfig, SlotOpen, TableDelta
from tests.helpers.command_maker import packed
from tests.helpers.tiny_models import write_tiny_model
from tests.unit.worker.test_executor import Commands
from worker.config import WorkerConfig
from worker.models.spec import load_model_spec
from worker.rank import Rank

# Ids repeat, so that penalties meet them; 33 tokens are two blocks of 16 and one token.
PROMPT = [5, 9, 200, 31, 77, 8, 150, 9] * 4 + [120]
MAX_MODEL_LEN = 80
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "seed": 42},
    "penalties": {
        "temperature": 0.9,
        "seed": 42,
        "repetition_penalty": 1.7,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.9,
    },
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder, "llama")
    return folder


@pytest.fixture(params=[1, 16])
def driven(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[Driven]:
    config = EngineConfig(
        dtype="float32",
        block_size=request.param,
        max_num_seqs=3,
        max_batch_tokens=64,
        max_model_len=MAX_MODEL_LEN,
        load_format="safetensors",
        comm="shm",
        kv_cache_bytes=1 << 24,
    )
    with torch.no_grad():
        rank = Rank(
            WorkerConfig(model_dir, "cpu", "127.0.0.1", 0, 0, 1, "", "", "text"),
            load_model_spec(model_dir),
        )
        rank.load(config)
        rank.join(b"", timeout_s=10)
        rank.capture()
        rank.init_kv_cache(3 * MAX_MODEL_LEN // request.param + 1, epoch=1)
        assert rank.executor is not None
        yield Driven(Commands(rank.executor), request.param)


class Driven:
    """Slots over blocks of their own, and over others' for what is cached."""

    def __init__(self, commands: Commands, block_size: int) -> None:
        self.commands = commands
        self.block_size = block_size
        self.blocks: dict[int, list[int]] = {}

    def open(
        self,
        slot: int,
        token_ids: list[int],
        kind: dict[str, Any],
        *,
        prompt_len: int = 0,
        cached_from: int = 0,
        cached_len: int = 0,
    ) -> SlotOpen:
        num_blocks = 64 // self.block_size
        own = [(slot - 1) * num_blocks + 1 + index for index in range(num_blocks)]
        num_cached = cached_len // self.block_size
        cached = self.blocks[cached_from][:num_cached] if num_cached else []
        self.blocks[slot] = [*cached, *own[num_cached:]]
        values = {"top_p": 1.0, "repetition_penalty": 1.0, "logprob_count": 3, **kind}
        return SlotOpen(
            slot=slot,
            prompt_len=prompt_len or len(token_ids),
            prefill_len=len(token_ids),
            limit=64,
            block_ids=packed(*self.blocks[slot]),
            cached_len=cached_len,
            cached_token_ids=packed(*token_ids[:cached_len]) if "presence_penalty" in kind else b"",
            **values,
        )

    def prefill(
        self, opening: SlotOpen, token_ids: list[int], chunk_len: int = 64, rows: int = 0
    ) -> int:
        """Runs its chunks from cached_len on; returns the token of the last."""
        opened = [opening]
        for start in range(opening.cached_len, len(token_ids), chunk_len):
            chunk = token_ids[start : start + chunk_len]
            delta = TableDelta(
                opened_slots=opened,
                chunks=packed(opening.slot, start, len(chunk)),
                chunk_token_ids=packed(*chunk),
                row_count=rows,
            )
            opened = []
            (entries,) = self.commands.run(delta)
        return entries[-1][0]


@pytest.mark.parametrize(
    ("name", "chunk_len"), [("greedy", 64), ("sampled", 1), ("penalties", 1), ("penalties", 64)]
)
def test_cached_blocks_change_no_token(driven: Driven, name: str, chunk_len: int) -> None:
    kind = KINDS[name]
    first = driven.prefill(driven.open(1, PROMPT, kind), PROMPT)
    cached = driven.open(2, PROMPT, kind, cached_from=1, cached_len=32)
    assert driven.prefill(cached, PROMPT, chunk_len) == first
    # Both decode over the shared blocks; neither disturbs the other.
    steps = [step for _ in range(2) for step in driven.commands.decode([1, 2], steps=8)]
    assert all(one == two for one, two in steps)
    assert len({one for one, _ in steps}) > 3


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_generated_blocks_serve_the_next_turn(driven: Driven, kind: dict[str, Any]) -> None:
    outputs = [driven.prefill(driven.open(1, PROMPT, kind), PROMPT)]
    outputs += [step[0] for step in driven.commands.decode([1], steps=20)]
    turn = [*PROMPT, *outputs, 11, 12]
    # Positions below 48 are computed: 33 of the prompt and 15 of the output.
    tokens = []
    for slot, cached_len in ((2, 0), (3, 48)):
        opening = driven.open(slot, turn, kind, cached_from=1, cached_len=cached_len)
        tokens.append(driven.prefill(opening, turn, rows=1))
    assert tokens[0] == tokens[1]
    steps = driven.commands.decode([2, 3], steps=6)
    assert all(one == two for one, two in steps)


def test_a_preempted_sequence_resumes_over_its_own_output(driven: Driven) -> None:
    kind = KINDS["penalties"]
    outputs = [driven.prefill(driven.open(1, PROMPT, kind), PROMPT)]
    outputs += [step[0] for step in driven.commands.decode([1], steps=24)]
    again = [*PROMPT, *outputs[:20]]
    opening = driven.open(2, again, kind, prompt_len=len(PROMPT), cached_from=1, cached_len=48)
    resumed = [driven.prefill(opening, again, rows=1)]
    resumed += [step[1] for step in driven.commands.decode([1, 2], steps=4)]
    assert resumed == outputs[20:25]


def test_penalties_without_the_cached_tokens_give_other_tokens(driven: Driven) -> None:
    """Plants the fault: counts of cached tokens that are lost must show."""
    kind = KINDS["penalties"]
    driven.prefill(driven.open(1, PROMPT, kind), PROMPT)
    opening = driven.open(2, PROMPT, kind, cached_from=1, cached_len=32)
    opening.cached_token_ids = packed(*[300] * 32)
    driven.prefill(opening, PROMPT)
    steps = driven.commands.decode([1, 2], steps=10)
    assert any(one != two for one, two in steps)


def test_a_cached_block_of_another_prompt_gives_other_tokens(driven: Driven) -> None:
    """Plants the fault: the blocks are really read."""
    other = [301 - token for token in PROMPT]
    kind = KINDS["sampled"]
    driven.prefill(driven.open(1, other, kind), other)
    expected = driven.prefill(driven.open(3, PROMPT, kind), PROMPT)
    wrong = driven.open(2, PROMPT, kind, cached_from=1, cached_len=32)
    tokens = [(expected, driven.prefill(wrong, PROMPT))]
    tokens += [(one, two) for one, two in driven.commands.decode([3, 2], steps=8)]
    assert any(one != two for one, two in tokens)
