"""What a rank tells the others about its shard of a row, and what may compete for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Five 32-bit words, so that one all-gather carries all of them.
RECORD_WORDS = 5
_VALUE, _ID, _RAW, _RAW_MAX, _RAW_SUM = range(RECORD_WORDS)


@dataclass(frozen=True)
class Bounds:
    """Closed range of scaled logits that compete, float32 [N] each."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class BestRecord:
    """Views of the words of `packed` int32 [..., RECORD_WORDS]."""

    packed: Tensor

    @property
    def value(self) -> Tensor:
        """float32: the best perturbed logit; -inf when no token competes."""
        return self.packed.view(torch.float32)[..., _VALUE]

    @property
    def token_id(self) -> Tensor:
        """int32: its id in the full vocabulary, the lowest among equals."""
        return self.packed[..., _ID]

    @property
    def raw(self) -> Tensor:
        """float32: its logit before penalties and temperature."""
        return self.packed.view(torch.float32)[..., _RAW]

    @property
    def raw_max(self) -> Tensor:
        """float32: the largest raw logit of the shard (0 without logprobs)."""
        return self.packed.view(torch.float32)[..., _RAW_MAX]

    @property
    def raw_sum(self) -> Tensor:
        """float32: sum of exp(raw - raw_max) over the shard (0 without logprobs)."""
        return self.packed.view(torch.float32)[..., _RAW_SUM]
