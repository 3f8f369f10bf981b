"""Device-resident sampling state of every slot: parameters, and penalty counts of this shard."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.sampling.choice_tables import ChoiceTables
from worker.sampling_params import MAX_STOP_IDS, MIN_TEMPERATURE, SlotParams

# A row is 30 words of 32 bits, so that one copy uploads all parameters of a slot and one
# index_select fetches them. The seed leads: read as an int64 it must lie on an even word.
_ROW = struct.Struct(f"<Q8f4i{MAX_STOP_IDS}i")
ROW_WORDS = _ROW.size // 4
TEMPERATURE_WORD = 2
INV_TEMPERATURE_WORD = 3
TOP_P_WORD = 4
MIN_P_WORD = 5
LOG_MIN_P_WORD = 6
REPETITION_WORD = 7
PRESENCE_WORD = 8
FREQUENCY_WORD = 9
TOP_K_WORD = 10
PROMPT_LEN_WORD = 11
MIN_TOKENS_WORD = 12
NUM_LOGPROBS_WORD = 13
STOP_IDS_WORD = 14

# A count holds "occurs in the prompt" in bit 30 and the number of outputs below it.
PROMPT_BIT = 1 << 30
OUTPUT_MASK = PROMPT_BIT - 1


@dataclass(frozen=True)
class RowParams:
    """Parameters of the rows of one step: a copy of table rows, `packed` int32 [N, ROW_WORDS]."""

    packed: Tensor

    def _float(self, word: int) -> Tensor:
        return self.packed.view(torch.float32)[:, word]

    @property
    def seed(self) -> Tensor:
        """int64 [N], the bits of the unsigned seed."""
        return self.packed.view(torch.int64)[:, 0]

    @property
    def temperature(self) -> Tensor:
        """float32 [N], 0 = greedy."""
        return self._float(TEMPERATURE_WORD)

    @property
    def inv_temperature(self) -> Tensor:
        """float32 [N], 1 for greedy rows."""
        return self._float(INV_TEMPERATURE_WORD)

    @property
    def top_p(self) -> Tensor:
        """float32 [N], 1 = off."""
        return self._float(TOP_P_WORD)

    @property
    def min_p(self) -> Tensor:
        """float32 [N], 0 = off."""
        return self._float(MIN_P_WORD)

    @property
    def log_min_p(self) -> Tensor:
        """float32 [N], -inf = off."""
        return self._float(LOG_MIN_P_WORD)

    @property
    def repetition(self) -> Tensor:
        """float32 [N], 1 = off."""
        return self._float(REPETITION_WORD)

    @property
    def presence(self) -> Tensor:
        """float32 [N], 0 = off."""
        return self._float(PRESENCE_WORD)

    @property
    def frequency(self) -> Tensor:
        """float32 [N], 0 = off."""
        return self._float(FREQUENCY_WORD)

    @property
    def top_k(self) -> Tensor:
        """int32 [N], 0 = off."""
        return self.packed[:, TOP_K_WORD]

    @property
    def prompt_len(self) -> Tensor:
        """int32 [N]."""
        return self.packed[:, PROMPT_LEN_WORD]

    @property
    def min_tokens(self) -> Tensor:
        """int32 [N]."""
        return self.packed[:, MIN_TOKENS_WORD]

    @property
    def num_logprobs(self) -> Tensor:
        """int32 [N], -1 = none wanted."""
        return self.packed[:, NUM_LOGPROBS_WORD]

    @property
    def stop_ids(self) -> Tensor:
        """int32 [N, 16], padded with -1."""
        return self.packed[:, STOP_IDS_WORD:]


class SlotSampling:
    """Tables over all slots. Slot 0 is the dummy: greedy, no stop ids, never counted.

    `packed` int32 [num_slots, ROW_WORDS] holds the parameters, `counts` int32
    [num_slots, padded_vocab] the tokens of this rank's vocabulary shard that occur in each
    sequence, kept for `counted_slots` (host) alone; `choices` what else decides which ids may be
    chosen. Memory is taken once; the addresses are
    stable under CUDA graphs. One thread issues all calls, and every method but `set_rows` is safe
    to capture.
    """

    def __init__(
        self, num_slots: int, padded_vocab: int, vocab_start: int, device: torch.device
    ) -> None:
        if num_slots < 1 or padded_vocab < 1:
            raise ValueError(f"num_slots {num_slots} and padded_vocab {padded_vocab}: at least 1")
        self.num_slots = num_slots
        self.vocab_start = vocab_start
        self.packed = pack_rows([SlotParams()] * num_slots).to(device)
        self.counts = torch.zeros(num_slots, padded_vocab, dtype=torch.int32, device=device)
        self.counted_slots: set[int] = set()
        self.choices = ChoiceTables(num_slots, padded_vocab, vocab_start, device)

    @property
    def all_rows(self) -> RowParams:
        """The tables themselves as columns over slots (views, not copies)."""
        return RowParams(self.packed)

    def rows(self, slots: Tensor) -> RowParams:
        """Parameters of `slots` int64 [N]."""
        return RowParams(self.packed.index_select(0, slots))

    def set_rows(self, slots: Sequence[int], params: Sequence[SlotParams]) -> None:
        """Begin new sequences in `slots`: upload their parameters, clear counts that are read.

        Raises:
            ValueError: a slot is outside the table, or the lengths differ.
        """
        if len(slots) != len(params):
            raise ValueError(f"set_rows got {len(slots)} slots and {len(params)} parameter sets")
        outside = [slot for slot in slots if not 1 <= slot < self.num_slots]
        if outside:
            raise ValueError(f"slots {outside} are outside 1..{self.num_slots - 1}")
        if not slots:
            return
        device = self.packed.device
        slot_index = torch.tensor(list(slots), dtype=torch.int64).to(device)
        self.packed.index_copy_(0, slot_index, pack_rows(params).to(device))
        self.choices.set_rows(slots, params)
        # A row of counts is touched only when a penalty reads it: on CPU the others stay
        # untouched zero pages.
        counted = [slot for slot, row in zip(slots, params, strict=True) if row.counts_tokens]
        self.counted_slots.difference_update(slots)
        self.counted_slots.update(counted)
        if counted:
            self.counts.index_fill_(0, torch.tensor(counted, dtype=torch.int64).to(device), 0)


def pack_rows(params: Sequence[SlotParams]) -> Tensor:
    """Host tensor int32 [len(params), ROW_WORDS], the rows of `SlotSampling.packed`."""
    packed = bytearray(b"".join(_pack_row(row) for row in params))
    return torch.frombuffer(packed, dtype=torch.int32).view(len(params), ROW_WORDS)


def _pack_row(row: SlotParams) -> bytes:
    # Filters cannot change a greedy choice; packed as off, they need no case on the device.
    greedy = row.is_greedy
    temperature = 0.0 if greedy else max(row.temperature, MIN_TEMPERATURE)
    min_p = 0.0 if greedy else row.min_p
    stop_ids = row.stop_ids + (-1,) * (MAX_STOP_IDS - len(row.stop_ids))
    return _ROW.pack(
        row.seed,
        temperature,
        1.0 if greedy else 1.0 / temperature,
        1.0 if greedy else row.top_p,
        min_p,
        math.log(min_p) if min_p > 0.0 else -math.inf,
        row.repetition_penalty,
        row.presence_penalty,
        row.frequency_penalty,
        0 if greedy else row.top_k,
        row.prompt_len,
        row.min_tokens,
        -1 if row.num_logprobs is None else row.num_logprobs,
        *stop_ids,
    )


def is_stop(tables: SlotSampling, slots: Tensor, token_ids: Tensor) -> Tensor:
    """bool [N]: whether each of `token_ids` int64 [N] is a stop id of its slot."""
    stop_ids = tables.rows(slots).stop_ids
    return (stop_ids == token_ids[:, None]).any(dim=1)
