"""Prefill and mixed steps as captured CUDA graphs, per padded number of rows and chunk tokens.

With steady arrivals nearly every step is mixed, and launching its hundreds of kernels one by one
takes a slow host longer than a GPU needs to run them.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from worker.chunk_tokens import ChunkShape, ChunkTokens, pack_chunks, view_chunks
from worker.cuda_graphs import CAPTURED_PLANS, Captured, GraphPool, captured_plan
from worker.device_tables import upload
from worker.model_runner import ModelRunner, StepTensors
from worker.sampling_params import SamplePlan
from worker.tables import Chunk

MAX_CHUNKS = 32
_TOKENS = (64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048)
_ROWS = (0, 16, 64)


class MixedGraphs:
    """Forward graphs per (rows, chunk tokens) and sampling graphs per rows.

    All read the chunks from one static buffer, filled by one copy before a replay, and leave their
    logits in one static tensor per number of rows. Used by the device thread alone.
    """

    def __init__(
        self, runner: ModelRunner, pool: GraphPool, max_num_seqs: int, max_batch_tokens: int
    ) -> None:
        self._runner = runner
        self._pool = pool
        self.row_sizes = [*(size for size in _ROWS if size < max_num_seqs), max_num_seqs]
        most = min(max_batch_tokens, _TOKENS[-1])
        self.token_sizes = [*(size for size in _TOKENS if size < most), most]
        device = runner.tables.device
        largest = sum(_shape(most).parts)
        self._packed = torch.zeros(largest, dtype=torch.int64, device=device)
        width, dtype = runner.model.shard.padded_vocab, runner.model.weights.lm_head.dtype
        self._logits = {
            rows: torch.zeros(rows + MAX_CHUNKS, width, dtype=dtype, device=device)
            for rows in self.row_sizes
        }
        self._forward: dict[tuple[int, int], Captured[None]] = {}
        self._choose: dict[tuple[int, SamplePlan], Captured[StepTensors]] = {}

    def capture(self) -> None:
        """Captures every size, largest first so that the pool is sized once."""
        for rows in reversed(self.row_sizes):
            for num_tokens in reversed(self.token_sizes):
                self._forward[rows, num_tokens] = self._capture_forward(rows, num_tokens)
            for plan in CAPTURED_PLANS:
                self._choose[rows, plan] = self._capture_choose(rows, plan)

    def covers(self, num_rows: int, chunks: Sequence[Chunk]) -> bool:
        """Whether a step of this size was captured."""
        num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
        return (
            len(chunks) <= MAX_CHUNKS
            and num_tokens <= self.token_sizes[-1]
            and num_rows <= self.row_sizes[-1]
            and all(chunk.targets is None for chunk in chunks)
        )

    def step(
        self, num_rows: int, chunks: Sequence[Chunk], plan: SamplePlan
    ) -> tuple[StepTensors, list[int]]:
        """Runs a step; returns its tensors and the indices of the real entries."""
        exact = ChunkShape.of(chunks)
        rows = self.row_sizes[bisect.bisect_left(self.row_sizes, num_rows)]
        num_tokens = self.token_sizes[bisect.bisect_left(self.token_sizes, exact.num_tokens)]
        self._runner.mark_counts(chunks)
        packed = pack_chunks(chunks, self._runner.tables.block_size, _shape(num_tokens))
        self._packed[: len(packed)].copy_(upload(packed, self._packed.device))
        self._pool.replay(self._forward[rows, num_tokens])
        entries = [*range(num_rows), *range(rows, rows + exact.num_finals)]
        choose = self._choose.get((rows, captured_plan(plan)))
        if choose is not None:
            return self._pool.replay(choose), entries
        return self._run_choose(rows, plan), entries

    def _capture_forward(self, rows: int, num_tokens: int) -> Captured[None]:
        def forward() -> None:
            logits = self._runner.mixed_forward(rows, self._tokens(num_tokens))
            self._logits[rows].copy_(logits)

        return self._pool.capture(forward)

    def _capture_choose(self, rows: int, plan: SamplePlan) -> Captured[StepTensors]:
        return self._pool.capture(lambda: self._run_choose(rows, plan))

    def _run_choose(self, rows: int, plan: SamplePlan) -> StepTensors:
        # The finals lie before the tokens, so where they lie does not depend on the token count.
        tokens = self._tokens(self.token_sizes[0])
        return self._runner.mixed_choose(self._logits[rows], rows, tokens, plan)

    def _tokens(self, num_tokens: int) -> ChunkTokens:
        shape = _shape(num_tokens)
        return view_chunks(self._view(shape), shape, ())

    def _view(self, shape: ChunkShape) -> Tensor:
        return self._packed[: sum(shape.parts)]


def _shape(num_tokens: int) -> ChunkShape:
    return ChunkShape(MAX_CHUNKS, MAX_CHUNKS, num_tokens)
