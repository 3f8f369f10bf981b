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
from worker.kv_cache import KvCache
from worker.models.transformer import Transformer
from worker.sampling import (
    SampleOutput,
    SamplePlan,
    SlotSampling,
    is_stop,
    mark_chunk,
    note_outputs,
    sample,
    score_prompt,
    update_counts,
)
from worker.tables import DUMMY_SLOT, Chunk

FLAG_STOP = 1
FLAG_NOT_FINITE = 2


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

    def decode_forward(self, num_rows: int) -> Tensor:
        """Logits fp32 [num_rows, padded_vocab] of rows 0..num_rows-1; writes their K and V."""
        batch = self._decode_batch(num_rows)
        return self.model.local_logits(self.model.forward(batch, self.kv_cache))

    def decode_choose(self, logits: Tensor, plan: SamplePlan) -> StepTensors:
        """Samples and advances the rows of `decode_forward`'s `logits`."""
        slots = self.tables.row_slots[: logits.shape[0]].long()
        return self._choose(logits, slots, plan)

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
        """Logits fp32 [num_rows + num_finals, padded_vocab]; writes K and V of all tokens."""
        hidden = self.model.forward(self._mixed_batch(num_rows, tokens), self.kv_cache)
        return self.model.local_logits(hidden)

    def mixed_choose(
        self, logits: Tensor, num_rows: int, tokens: ChunkTokens, plan: SamplePlan
    ) -> StepTensors:
        """Samples and advances the rows and the final chunks of `mixed_forward`'s `logits`."""
        rows = self.tables.row_slots[:num_rows].long()
        return self._choose(logits, torch.cat([rows, tokens.final_slots]), plan)

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
        tables = self.tables
        slots = tables.row_slots[:num_rows].long()
        positions = tables.position[slots].long()
        active = self._active(slots, positions)
        # An inert row may stand one past its blocks and the rope table: it computes position 0.
        positions = torch.where(active, positions, 0)
        block_ids = torch.where(
            active, tables.block_table[slots, positions // tables.block_size], 0
        )
        return ForwardBatch(
            token_ids=tables.last_token[slots].long(),
            positions=positions,
            slot_mapping=block_ids * tables.block_size + positions % tables.block_size,
            num_decode_rows=num_rows,
            decode_slots=torch.where(active, slots, DUMMY_SLOT),
            decode_lens=(positions + 1).int(),
            block_table=tables.block_table,
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

    def _active(self, slots: Tensor, positions: Tensor) -> Tensor:
        below = positions < self.tables.limit[slots]
        return below & (self.tables.stopped[slots] == 0)

    def _choose(self, logits: Tensor, slots: Tensor, plan: SamplePlan) -> StepTensors:
        """Samples one token per slot and advances the slots that are not inert."""
        tables = self.tables
        positions = tables.position[slots].long()
        active = self._active(slots, positions)
        sampled = sample(
            logits,
            slots,
            positions + 1,
            self.sampling,
            self.comm,
            self.sampling.vocab_start,
            plan.variant,
            plan.with_penalties,
            plan.with_logprobs,
            all_greedy=plan.all_greedy,
            with_top_k=plan.with_top_k,
            with_top_p=plan.with_top_p,
            with_bias=plan.with_bias,
            with_bad_words=plan.with_bad_words,
            with_mask=plan.with_mask,
        )
        emits = active & sampled.finite
        stops = emits & is_stop(self.sampling, slots, sampled.token_ids)
        bad = active & ~sampled.finite
        if plan.with_penalties:
            update_counts(self.sampling, slots, sampled.token_ids, emits)
        if plan.with_bad_words:
            note_outputs(self.sampling.choices, slots, sampled.token_ids, emits)
        token_ids = sampled.token_ids.int()
        # Padding rows all write the dummy slot, and all write the values that it has.
        tables.last_token[slots] = torch.where(emits, token_ids, tables.last_token[slots])
        tables.position[slots] = (positions + emits).int()
        tables.stopped[slots] = tables.stopped[slots] | (stops | bad).int()
        flags = stops.to(torch.uint8) * FLAG_STOP + bad.to(torch.uint8) * FLAG_NOT_FINITE
        return _step_tensors(torch.where(emits, token_ids, -1), flags, sampled)


def _step_tensors(token_ids: Tensor, flags: Tensor, sampled: SampleOutput) -> StepTensors:
    return StepTensors(token_ids, flags, sampled.logprobs, sampled.top_ids, sampled.top_logprobs)


def empty_step(device: torch.device) -> StepTensors:
    """The result of a step in which nobody gets a token."""
    none = torch.empty(0, dtype=torch.int32, device=device)
    return StepTensors(none, none.to(torch.uint8), None, None, None)
