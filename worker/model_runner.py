"""Runs steps on the device: tables -> forward pass -> sampled tokens -> advanced tables."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tpcomm import Communicator
from worker.chunk_tokens import (
    ChunkShape,
    ChunkTokens,
    pack_chunks,
    scored_tokens,
    view_chunks,
)
from worker.device_tables import DeviceTables, upload
from worker.forward_batch import ForwardBatch
from worker.kernels.advance import advance
from worker.kv_cache import KvCache
from worker.models.transformer import Transformer
from worker.ops import Ops
from worker.sampling import (
    SamplePlan,
    SampleVariant,
    SlotSampling,
    best_records,
    mark_chunk,
    note_outputs,
    sample,
    score_prompt,
    update_counts,
)
from worker.tables import Chunk


@dataclass(frozen=True)
class StepTensors:
    """What a step leaves on the device, one entry per decode row, then per final chunk.

    `token_ids` int32 [N], -1 for inert rows; `flags` uint8 [N], FLAG_* bits; the others as in
    SampleOutput, None unless some row wants them. Padding rows follow the real ones. The prompt's
    tensors are those of PromptScores for the chunks with targets, None without any.
    """

    token_ids: Tensor
    flags: Tensor
    logprobs: Tensor | None
    top_ids: Tensor | None
    top_logprobs: Tensor | None
    prompt_logprobs: Tensor | None = None
    prompt_top_ids: Tensor | None = None
    prompt_top_logprobs: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """The tensors that exist, by field name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class ModelRunner:
    """One rank's model with its tables. Used by the device thread alone.

    Every method only enqueues work on the current stream (on CPU: does it).
    """

    model: Transformer
    kv_cache: KvCache
    tables: DeviceTables
    sampling: SlotSampling
    comm: Communicator
    ops: Ops

    def decode_forward(self, num_rows: int) -> Tensor:
        """Logits [num_rows, padded_vocab] of rows 0..num_rows-1; writes their K and V."""
        batch = self._decode_batch(num_rows)
        return self.model.local_logits(self.model.forward(batch, self.kv_cache))

    def decode_choose(self, logits: Tensor, plan: SamplePlan) -> StepTensors:
        """Samples and advances the rows of `decode_forward`'s `logits`."""
        rows = self.ops.row_inputs(self.tables, logits.shape[0])
        return self._choose(logits, rows.slots, rows.next_positions, plan)

    def decode_step(self, num_rows: int, plan: SamplePlan) -> StepTensors:
        """One step over rows 0..num_rows-1, without a graph."""
        return self.decode_choose(self.decode_forward(num_rows), plan)

    def mixed_step(self, num_rows: int, chunks: list[Chunk], plan: SamplePlan) -> StepTensors:
        """One step over the rows and the chunks together, without a graph."""
        tables = self.tables
        self.mark_counts(chunks)
        uploaded = upload(pack_chunks(chunks, tables.block_size), tables.device)
        tokens = view_chunks(uploaded, ChunkShape.of(chunks), chunks)
        scored, targets = scored_tokens(chunks)
        scored_rows = upload(scored + num_rows, tables.device) if len(scored) else None
        hidden = self.model.forward(self._mixed_batch(num_rows, tokens, scored_rows), self.kv_cache)
        num_chosen = len(hidden) - len(scored)
        step = empty_step(tables.device)
        if num_chosen:
            logits = self.model.local_logits(hidden[:num_chosen])
            step = self.mixed_choose(logits, num_rows, tokens, plan)
        if not len(scored):
            return step
        scores = score_prompt(
            hidden[num_chosen:],
            upload(targets, tables.device),
            self.model.local_logits,
            self.sampling.vocab_start,
            self.comm,
        )
        return replace(
            step,
            prompt_logprobs=scores.logprobs,
            prompt_top_ids=scores.top_ids,
            prompt_top_logprobs=scores.top_logprobs,
        )

    def mixed_forward(self, num_rows: int, tokens: ChunkTokens) -> Tensor:
        """Logits [num_rows + num_finals, padded_vocab]; writes K and V of all tokens."""
        hidden = self.model.forward(self._mixed_batch(num_rows, tokens), self.kv_cache)
        return self.model.local_logits(hidden)

    def mixed_choose(
        self, logits: Tensor, num_rows: int, tokens: ChunkTokens, plan: SamplePlan
    ) -> StepTensors:
        """Samples and advances the rows and the final chunks of `mixed_forward`'s `logits`."""
        rows = self.tables.row_slots[:num_rows].long()
        slots = torch.cat([rows, tokens.final_slots])
        return self._choose(logits, slots, self.tables.position[slots].long() + 1, plan)

    def mark_counts(self, chunks: Seq[Chunk]) -> None:
        """Notes the chunks' tokens for those sequences whose penalties will ask for them."""
        for chunk in chunks:
            if chunk.sequence.slot in self.sampling.counted_slots:
                token_ids = torch.from_numpy(chunk.token_ids.astype("int64"))
                mark_chunk(
                    self.sampling,
                    chunk.sequence.slot,
                    token_ids.to(self.tables.device),
                    chunk.start,
                    chunk.sequence.prompt_len,
                )

    def _decode_batch(self, num_rows: int) -> ForwardBatch:
        rows = self.ops.row_inputs(self.tables, num_rows)
        return ForwardBatch(
            token_ids=rows.token_ids,
            positions=rows.positions,
            slot_mapping=rows.slot_mapping,
            num_decode_rows=num_rows,
            decode_slots=rows.decode_slots,
            decode_lens=rows.decode_lens,
            block_table=self.tables.block_table,
            chunks=None,
            logit_rows=None,
        )

    def _mixed_batch(
        self, num_rows: int, tokens: ChunkTokens, scored_rows: Tensor | None = None
    ) -> ForwardBatch:
        rows = self._decode_batch(num_rows)
        row_tokens = torch.arange(num_rows, device=self.tables.device)
        logit_rows = [row_tokens, tokens.final_tokens + num_rows]
        if scored_rows is not None:
            logit_rows.append(scored_rows)
        return ForwardBatch(
            token_ids=torch.cat([rows.token_ids, tokens.token_ids]),
            positions=torch.cat([rows.positions, tokens.positions]),
            slot_mapping=torch.cat([rows.slot_mapping, tokens.slot_mapping]),
            num_decode_rows=num_rows,
            decode_slots=rows.decode_slots,
            decode_lens=rows.decode_lens,
            block_table=rows.block_table,
            chunks=tokens.chunks,
            logit_rows=torch.cat(logit_rows),
        )

    def _choose(
        self, logits: Tensor, slots: Tensor, next_positions: Tensor, plan: SamplePlan
    ) -> StepTensors:
        """Samples one token per slot and advances the slots that are not inert."""
        tables, sampling, comm = self.tables, self.sampling, self.comm
        logprobs = top_ids = top_logprobs = None
        if plan.variant is SampleVariant.LOCAL_BEST and not plan.with_logprobs:
            records = best_records(logits, slots, next_positions, sampling, comm, plan)
            advanced = self.ops.advance_best(records, slots, tables, sampling)
        else:
            sampled = sample(logits, slots, next_positions, sampling, comm, plan)
            logprobs, top_ids = sampled.logprobs, sampled.top_ids
            top_logprobs = sampled.top_logprobs
            advanced = advance(sampled.token_ids, sampled.finite, slots, tables, sampling)
        if plan.with_penalties:
            update_counts(sampling, slots, advanced.token_ids.long(), advanced.emits)
        if plan.with_bad_words:
            note_outputs(sampling.choices, slots, advanced.token_ids.long(), advanced.emits)
        return StepTensors(advanced.token_ids, advanced.flags, logprobs, top_ids, top_logprobs)


def empty_step(device: torch.device) -> StepTensors:
    """The result of a step in which nobody gets a token."""
    none = torch.empty(0, dtype=torch.int32, device=device)
    return StepTensors(none, none.to(torch.uint8), None, None, None)
