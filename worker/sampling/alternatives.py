"""The best tokens of the raw distribution, for reporting beside the sampled one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worker.sampling.ordered_bits import key_ids, key_values, rank_keys
from worker.sampling_params import MAX_ALTERNATIVES

# Keys take 8 bytes a token, so rows are done in groups to bound the workspace.
_ROWS_AT_ONCE = 32


def local_alternatives(raw: Tensor, vocab_start: int) -> Tensor:
    """int64 [N, 20] rank keys of this shard's best `raw` float32 [N, V], best first.

    Shards of fewer than 20 columns give all they have.
    """
    num_kept = min(MAX_ALTERNATIVES, raw.shape[1])
    ids = torch.arange(vocab_start, vocab_start + raw.shape[1], device=raw.device)
    groups = torch.split(raw, _ROWS_AT_ONCE)
    return torch.cat([rank_keys(rows, ids).topk(num_kept, dim=1).values for rows in groups])


def merge_alternatives(keys: Tensor, log_normalizer: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids int32 [N, 20] and raw logprobs float32 [N, 20], best first, ties by id.

    `keys` int64 [world_size, N, n] are every rank's, `log_normalizer` float32 [N]. Places that
    the vocabulary cannot fill have id -1 and logprob -inf.
    """
    merged = keys.transpose(0, 1).flatten(1)
    best = merged.topk(min(MAX_ALTERNATIVES, merged.shape[1]), dim=1).values
    raw = key_values(best)
    ids = torch.where(raw == -math.inf, -1, key_ids(best)).to(torch.int32)
    missing = (0, MAX_ALTERNATIVES - best.shape[1])
    logprobs = raw - log_normalizer[:, None]
    return (
        torch.nn.functional.pad(ids, missing, value=-1),
        torch.nn.functional.pad(logprobs, missing, value=-math.inf),
    )
