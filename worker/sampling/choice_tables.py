"""Device-resident state of what a slot may choose: biases, bad words, the mask of a constraint."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.sampling_params import (
    MAX_BAD_WORD_IDS,
    MAX_BAD_WORDS,
    MAX_BIASED_IDS,
    SlotParams,
)

NO_ID = -1
ANY_ID = -1
"""In a prefix: what stands before a shorter bad word."""
NO_OUTPUT = -2
_NUM_BEFORE = MAX_BAD_WORD_IDS - 1
_ALL_ALLOWED = 255

UInt8Array = npt.NDArray[np.uint8]


class ChoiceTables:
    """Tables over all slots; ids are of the whole vocabulary, masks of this rank's shard.

    `bias_ids` int32 and `bias_values` float32 [num_slots, 300], unused ids NO_ID; `prefixes` int32
    [num_slots, 32, 15] and `last_ids` int32 [num_slots, 32] are the bad words, unused ones NO_ID;
    `recent` int32 [num_slots, 15] the outputs before the next one, kept for slots with bad words;
    `masks` uint8 [num_slots, padded_vocab / 8], bit i % 8 of byte i // 8 allows column i. Rows of
    slots without these features say so, whoever had the slot before. One thread issues all calls.
    """

    def __init__(
        self, num_slots: int, padded_vocab: int, vocab_start: int, device: torch.device
    ) -> None:
        def full(value: int, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((num_slots, *shape), value, dtype=dtype, device=device)

        self.vocab_start = vocab_start
        self.bias_ids = full(NO_ID, torch.int32, MAX_BIASED_IDS)
        self.bias_values = full(0, torch.float32, MAX_BIASED_IDS)
        self.prefixes = full(ANY_ID, torch.int32, MAX_BAD_WORDS, _NUM_BEFORE)
        self.last_ids = full(NO_ID, torch.int32, MAX_BAD_WORDS)
        self.recent = full(NO_OUTPUT, torch.int32, _NUM_BEFORE)
        self.masks = full(_ALL_ALLOWED, torch.uint8, -(-padded_vocab // 8))
        # Host: slots whose rows say something, which the next sequence there must not inherit.
        self._biased: set[int] = set()
        self._banned: set[int] = set()
        self._masked: set[int] = set()

    def set_rows(self, slots: Sequence[int], params: Sequence[SlotParams]) -> None:
        """Begins new sequences in `slots`. Costs nothing for slots without these features."""
        for slot, row in zip(slots, params, strict=True):
            if row.logit_bias or slot in self._biased:
                self._set_bias(slot, row)
            if row.bad_words or slot in self._banned:
                self._set_bad_words(slot, row)
            if slot in self._masked:
                self.masks[slot] = _ALL_ALLOWED
                self._masked.discard(slot)

    def set_masks(self, masks: Sequence[tuple[int, UInt8Array]]) -> None:
        """Slot and bit per id of the whole vocabulary, uint8 [(vocab_size + 7) // 8] each.

        Columns past the vocabulary are not allowed.
        """
        assert not masks or self.vocab_start % 8 == 0, self.vocab_start
        first = self.vocab_start // 8
        for slot, bits in masks:
            local = np.zeros(self.masks.shape[1], np.uint8)
            mine = bits[first : first + len(local)]
            local[: len(mine)] = mine
            self._upload(self.masks, slot, torch.from_numpy(local))
            self._masked.add(slot)

    def _set_bias(self, slot: int, row: SlotParams) -> None:
        ids = torch.full((MAX_BIASED_IDS,), NO_ID, dtype=torch.int32)
        values = torch.zeros(MAX_BIASED_IDS)
        for index, (token_id, value) in enumerate(row.logit_bias):
            ids[index], values[index] = token_id, value
        self._upload(self.bias_ids, slot, ids)
        self._upload(self.bias_values, slot, values)
        _note(self._biased, slot, bool(row.logit_bias))

    def _set_bad_words(self, slot: int, row: SlotParams) -> None:
        prefixes = torch.full((MAX_BAD_WORDS, _NUM_BEFORE), ANY_ID, dtype=torch.int32)
        last_ids = torch.full((MAX_BAD_WORDS,), NO_ID, dtype=torch.int32)
        recent = torch.full((_NUM_BEFORE,), NO_OUTPUT, dtype=torch.int32)
        for index, word in enumerate(row.bad_words):
            last_ids[index] = word[-1]
            if len(word) > 1:
                prefixes[index, 1 - len(word) :] = torch.tensor(word[:-1], dtype=torch.int32)
        if row.recent_ids:
            recent[-len(row.recent_ids) :] = torch.tensor(row.recent_ids, dtype=torch.int32)
        self._upload(self.prefixes, slot, prefixes)
        self._upload(self.last_ids, slot, last_ids)
        self._upload(self.recent, slot, recent)
        _note(self._banned, slot, bool(row.bad_words))

    @staticmethod
    def _upload(table: Tensor, slot: int, row: Tensor) -> None:
        """In stream order; torch guards the pinned memory until the copy is done."""
        source = row.pin_memory() if table.is_cuda else row
        table[slot].copy_(source, non_blocking=True)


def _note(slots: set[int], slot: int, is_in: bool) -> None:
    if is_in:
        slots.add(slot)
    else:
        slots.discard(slot)
