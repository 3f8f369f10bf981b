"""What a real worker keeps on its device for every slot, in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from protos.lockstep.v1 import worker_pb2
from worker.sampling_params import MAX_STOP_IDS
from worker.simulated.tokens import TokenChooser, alternatives, mix
from worker.tables import AppliedDelta, Chunk, Sequence

Int32Array = npt.NDArray[np.int32]
_FLAG_STOP = 1


class SimulatedSlots:
    """Positions, last tokens and stop flags, advanced by the steps as on a device.

    All arrays are [num_slots] but stop_ids [num_slots, 16]; slot 0 is the dummy.
    """

    def __init__(self, num_slots: int, vocab_size: int, chooser: TokenChooser, seed: int) -> None:
        self._vocab_size = vocab_size
        self._chooser = chooser
        self._seed = np.array([seed & (2**64 - 1)], np.uint64)
        self._position = np.zeros(num_slots, np.int32)
        self._last_token = np.zeros(num_slots, np.int32)
        self._limit = np.zeros(num_slots, np.int32)
        self._is_stopped = np.zeros(num_slots, np.bool_)
        self._seeds = np.zeros(num_slots, np.uint64)
        self._stops_from = np.zeros(num_slots, np.int64)  # first position that may hold a stop id
        self._stop_ids = np.full((num_slots, MAX_STOP_IDS), -1, np.int32)
        self._num_logprobs = np.full(num_slots, -1, np.int32)
        self._allowed: dict[int, Int32Array] = {}  # ids, by constrained slot that has had a mask

    def write(self, applied: AppliedDelta) -> None:
        """Writes a command's changes."""
        for seq in applied.opened:
            self._open(seq)
        for slot, limit in applied.limits:
            self._limit[slot] = limit
        for slot, bits in applied.masks:
            is_allowed = np.unpackbits(bits, bitorder="little")
            self._allowed[slot] = np.flatnonzero(is_allowed).astype(np.int32)

    def step(self, row_slots: Int32Array, chunks: list[Chunk]) -> worker_pb2.StepResult:
        """Tokens of one step over the rows and the final ones of `chunks`; numbers are unset."""
        finals = [chunk for chunk in chunks if chunk.is_final]
        for chunk in finals:
            slot = chunk.sequence.slot
            self._position[slot] = chunk.sequence.prefill_len - 1
            self._last_token[slot] = chunk.token_ids[-1]
        final_slots = np.array([chunk.sequence.slot for chunk in finals], np.int32)
        slots = np.concatenate([row_slots, final_slots])
        emits = (self._position[slots] < self._limit[slots]) & ~self._is_stopped[slots]
        positions = self._position[slots] + 1
        tokens, stops = self._chooser.choose(
            self._seeds[slots],
            positions,
            self._last_token[slots],
            self._stop_ids[slots],
            positions >= self._stops_from[slots],
        )
        self._heed_masks(slots, positions, tokens, stops)
        stops &= emits
        self._last_token[slots] = np.where(emits, tokens, self._last_token[slots])
        self._position[slots] += emits
        self._is_stopped[slots] |= stops
        tokens = np.where(emits, tokens, -1).astype("<i4")
        result = worker_pb2.StepResult(
            token_ids=tokens.tobytes(), flags=(stops * np.uint8(_FLAG_STOP)).tobytes()
        )
        self._add_logprobs(result, slots, tokens)
        self._score_prompts(result, chunks)
        return result

    def _score_prompts(self, result: worker_pb2.StepResult, chunks: list[Chunk]) -> None:
        targets = [chunk.targets for chunk in chunks if chunk.targets is not None]
        if targets:
            scores = alternatives(np.concatenate(targets), self._vocab_size)
            result.prompt_logprobs = scores[0].tobytes()
            result.prompt_top_token_ids = scores[1].tobytes()
            result.prompt_top_logprobs = scores[2].tobytes()

    def _heed_masks(
        self,
        slots: Int32Array,
        positions: Int32Array,
        tokens: Int32Array,
        stops: npt.NDArray[np.bool_],
    ) -> None:
        """Chooses again, of what they allow, for constrained slots; a stop id as well as any."""
        if not self._allowed:
            return
        for index, slot in enumerate(slots.tolist()):
            allowed = self._allowed.get(slot)
            if allowed is None or not len(allowed):
                continue
            key = mix(mix(self._seeds[slot : slot + 1]) ^ np.uint64(positions[index]))[0]
            tokens[index] = allowed[int(key) % len(allowed)]
            stops[index] = tokens[index] in self._stop_ids[slot]

    def _open(self, seq: Sequence) -> None:
        params, slot = seq.params, seq.slot
        # The seed of greedy requests means nothing, as in a model.
        own = np.array([0 if params.is_greedy else params.seed], np.uint64)
        self._allowed.pop(slot, None)
        self._seeds[slot] = mix(mix(self._seed) ^ own)[0]
        self._is_stopped[slot] = False
        self._stops_from[slot] = params.prompt_len + params.min_tokens
        self._stop_ids[slot] = -1
        # No model chooses an id that it has no logit for.
        stop_ids = [token for token in params.stop_ids if token < self._vocab_size]
        self._stop_ids[slot, : len(stop_ids)] = stop_ids
        self._num_logprobs[slot] = -1 if params.num_logprobs is None else params.num_logprobs

    def _add_logprobs(
        self, result: worker_pb2.StepResult, slots: Int32Array, tokens: Int32Array
    ) -> None:
        wanted = self._num_logprobs[slots].max(initial=-1)
        if wanted < 0:
            return
        logprobs, top_ids, top_logprobs = alternatives(tokens, self._vocab_size)
        result.logprobs = logprobs.tobytes()
        if wanted > 0:
            result.top_token_ids = top_ids.tobytes()
            result.top_logprobs = top_logprobs.tobytes()
