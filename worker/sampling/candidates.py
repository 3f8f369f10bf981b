"""TOP_CANDIDATES: the 64 best tokens of every shard decide top_k <= 64, top_p and min_p exactly.

A shard's 64th best scaled logit is its *floor*. The k-th best of the whole vocabulary (k <= 64)
is never below any floor, so all that survives top_k is a candidate or is tied with a floor. The
tied are not listed but summed up: how many they are beyond the candidates, and the best
perturbed among them. With that, ties at a threshold are kept exactly, however many.

Rows without filters (they are here for alternatives, or beside other rows) compete with their
whole shard through the same record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.sampling.fixed_point import fixed_mass, nucleus_target
from worker.sampling.gumbel_kernel import gumbel_at
from worker.sampling.philox import gumbel_at_reference
from worker.sampling.record import RECORD_WORDS, BestRecord, Bounds
from worker.sampling.tables import RowParams
from worker.sampling_params import NUM_CANDIDATES


@dataclass(frozen=True)
class Candidates:
    """Each rank's share: locally [N, ...], gathered [world_size, N, ...]; C = 64 or the shard."""

    values: Tensor  # float32 [..., C], scaled logits, descending
    token_ids: Tensor  # int32 [..., C]
    perturbed: Tensor  # float32 [..., C]
    raw: Tensor  # float32 [..., C]
    num_tied: Tensor  # int32 [...], tokens equal to the floor that are not among the C
    wide: BestRecord  # best of the tokens equal to the floor; without top_k, of the shard

    def pack(self) -> Tensor:
        """int32 [..., 4 * C + 1 + RECORD_WORDS], for one all-gather."""
        parts = (
            self.values.view(torch.int32),
            self.token_ids,
            self.perturbed.view(torch.int32),
            self.raw.view(torch.int32),
            self.num_tied[..., None],
            self.wide.packed,
        )
        return torch.cat(parts, dim=-1)

    @staticmethod
    def unpack(packed: Tensor) -> Candidates:
        num_candidates = (packed.shape[-1] - 1 - RECORD_WORDS) // 4
        sizes = [num_candidates] * 4 + [1, RECORD_WORDS]
        values, ids, perturbed, raw, num_tied, wide = torch.split(packed, sizes, dim=-1)
        return Candidates(
            values=values.view(torch.float32),
            token_ids=ids,
            perturbed=perturbed.view(torch.float32),
            raw=raw.view(torch.float32),
            num_tied=num_tied[..., 0],
            wide=BestRecord(wide.contiguous()),
        )


def wide_bounds(floor: Tensor, rows: RowParams) -> Bounds:
    """What competes in the record: ties with `floor` [N] under top_k, everything without."""
    filtered = rows.top_k > 0
    return Bounds(
        low=torch.where(filtered, floor, -math.inf), high=torch.where(filtered, floor, math.inf)
    )


def local_top(scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Values float32 and columns int64 [N, C] of the best `scaled` [N, V], best first."""
    best = scaled.topk(min(NUM_CANDIDATES, scaled.shape[1]), dim=1)
    return best.values, best.indices


def make_candidates(
    scaled: Tensor,
    raw: Tensor,
    top: tuple[Tensor, Tensor],
    wide: BestRecord,
    rows: RowParams,
    positions: Tensor,
    vocab_start: int,
    all_greedy: bool,
) -> Candidates:
    """This rank's candidates [N, ...], given its `local_top` and record."""
    values, columns = top
    floor = values[:, -1:]
    token_ids = columns + vocab_start
    perturbed = values
    if not all_greedy:
        noise_of = gumbel_at if scaled.is_cuda else gumbel_at_reference
        noise = noise_of(rows.seed, positions, token_ids)
        perturbed = torch.where(rows.temperature[:, None] > 0, values + noise, values)
    num_tied = (scaled == floor).sum(dim=1) - (values == floor).sum(dim=1)
    return Candidates(
        values=values,
        token_ids=token_ids.to(torch.int32),
        perturbed=perturbed,
        raw=raw.gather(1, columns),
        num_tied=num_tied.to(torch.int32),
        wide=wide,
    )


def kept_from(gathered: Candidates, rows: RowParams, overall_max: Tensor) -> Tensor:
    """float32 [N]: the least scaled logit that min_p, top_k and top_p keep."""
    merged = gathered.values.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values
    kth_index = (rows.top_k.to(torch.int64) - 1).clamp(0, merged.shape[1] - 1)
    kth = merged.gather(1, kth_index[:, None])[:, 0]
    kth = torch.where(rows.top_k > 0, kth, -math.inf)
    least = torch.maximum(kth, overall_max + rows.log_min_p)

    floors = gathered.values[:, :, -1].t()
    mass = torch.where(merged >= least[:, None], fixed_mass(merged, overall_max), 0)
    reached = mass.cumsum(dim=1)
    tied = torch.where(floors == least[:, None], gathered.num_tied.t(), 0).sum(dim=1)
    total = reached[:, -1] + tied * fixed_mass(least[:, None], overall_max)[:, 0]
    # The tied are the least that is left: where the candidates before them do not reach the
    # target, the nucleus ends at `least`.
    short = (reached < nucleus_target(rows.top_p, total)[:, None]).sum(dim=1)
    last = merged.gather(1, short.clamp(max=merged.shape[1] - 1)[:, None])[:, 0]
    nucleus = torch.where(short < merged.shape[1], torch.maximum(last, least), least)
    return torch.where(rows.top_p < 1.0, nucleus, least)


def choose_candidate(gathered: Candidates, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids int64 [N] and their raw logits float32 [N]: best perturbed, ties to lowest id."""
    listed = torch.where(gathered.values >= kept[:, None], gathered.perturbed, -math.inf)
    floors = gathered.values[:, :, -1]
    summed = torch.where(floors >= kept, gathered.wide.value, -math.inf)
    perturbed = _by_row(listed, summed)
    ids = _by_row(gathered.token_ids, gathered.wide.token_id)
    raw = _by_row(gathered.raw, gathered.wide.raw)
    is_best = perturbed == perturbed.amax(dim=1, keepdim=True)
    winner = torch.where(is_best, ids, torch.iinfo(torch.int32).max).argmin(dim=1, keepdim=True)
    return ids.gather(1, winner)[:, 0].to(torch.int64), raw.gather(1, winner)[:, 0]


def _by_row(listed: Tensor, summed: Tensor) -> Tensor:
    """[N, world_size * (C + 1)] from [world_size, N, C] and [world_size, N]."""
    return torch.cat((listed, summed[:, :, None]), dim=2).transpose(0, 1).flatten(1)
