"""Steps by graph, decode and mixed, choose the tokens that eager steps choose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from protos.lockstep.v1.worker_pb2 import TableDelta
from tests.helpers.command_maker import packed
from tests.helpers.tiny_models import write_tiny_model
from tests.unit.worker.test_executor import (
    PROMPT,
    Commands,
    engine_config,
    opening,
    prefill,
)
from worker.config import WorkerConfig
from worker.device import prepare_device
from worker.models.spec import load_model_spec
from worker.rank import Rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 1 GPU"),
]


def run_history(model_dir: Path, use_graphs: bool) -> list[list[tuple[int, int]]]:
    """Prefill, decode, a second prompt in two chunks beside it, two prompts at once, decode."""
    config = WorkerConfig(model_dir, "cuda:0", "127.0.0.1", 0, 0, 1, "", "", "text")
    prepare_device(config)
    rank = Rank(config, load_model_spec(model_dir))
    settings = engine_config()
    settings.comm, settings.use_graphs, settings.gpu_memory_fraction = "nccl", use_graphs, 0.9
    rank.load(settings)
    rank.join(b"", timeout_s=10)
    rank.capture()
    rank.init_kv_cache(60, epoch=1)
    assert rank.executor is not None
    commands = Commands(rank.executor)
    steps = commands.run(prefill(opening(1), PROMPT))
    steps += commands.run(TableDelta(row_changes=packed(0, 1), row_count=1), steps=3)
    first = TableDelta(
        opened_slots=[opening(2, temperature=0.8, seed=3)],
        chunks=packed(2, 0, 4),
        chunk_token_ids=packed(*PROMPT[:4]),
        row_count=1,
    )
    steps += commands.run(first)
    third = opening(3, top_p=0.9, temperature=1.0, seed=9)
    rest = TableDelta(
        opened_slots=[third],
        chunks=packed(2, 4, 3, 3, 0, 7),
        chunk_token_ids=packed(*PROMPT[4:], *PROMPT),
        row_count=1,
    )
    steps += commands.run(rest)
    rows = TableDelta(row_changes=packed(0, 1, 1, 2, 2, 3), row_count=3)
    steps += commands.run(rows, steps=5)
    steps += constrained_steps(commands)
    rank.reset()
    return steps


def constrained_steps(commands: Commands) -> list[list[tuple[int, int]]]:
    """Slot 2 goes on beside a constrained sequence whose prompt is scored; 7, then 3."""
    limit = len(PROMPT)
    first = prefill(opening(1, limit=limit, is_constrained=True), PROMPT)
    first.closed_slots = packed(1, 3)
    first.row_changes, first.row_count = packed(0, 2, 1, 0, 2, 0), 1
    first.masks.add(slot=1, ids=packed(7))
    first.prompt_targets = packed(1, -1)
    steps = commands.run(first)
    second = TableDelta(row_changes=packed(1, 1), row_count=2, limits=packed(1, limit + 1))
    second.masks.add(slot=1, ids=packed(3))
    return steps + commands.run(second, steps=2)


def test_graphs_choose_the_tokens_of_eager_steps(tmp_path: Path) -> None:
    write_tiny_model(tmp_path, "llama")
    eager = run_history(tmp_path, use_graphs=False)
    assert run_history(tmp_path, use_graphs=True) == eager
    assert all(token >= 0 for step in eager[:-1] for token, _ in step)
    assert [step[1] for step in eager[-3:]] == [(7, 0), (3, 0), (-1, 0)]
