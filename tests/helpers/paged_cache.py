"""A paged KV cache of known contents made to be hostile, and attention over it spelled out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.forward_batch import PrefillChunks


@dataclass(frozen=True)
class PagedCache:
    """Slot s holds `keys[s]` and `values[s]`, [length, num_kv_heads, head_dim], in shuffled blocks.

    Whatever no token owns is NaN: unused blocks, the ends of last blocks, and the block that
    unused entries of the block table point at. The caches are strided views of one layer of three.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor

    @staticmethod
    def create(
        lens: tuple[int, ...],
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
    ) -> PagedCache:
        generator = torch.Generator().manual_seed(seed)
        needed = [-(-length // block_size) for length in lens]
        num_blocks = 1 + sum(needed)  # block 0 belongs to nobody
        blocks = torch.full((num_blocks, 3, 2, block_size, num_kv_heads, head_dim), torch.nan)
        order = (torch.randperm(sum(needed), generator=generator) + 1).tolist()
        table = torch.zeros((len(lens), max(needed) + 1), dtype=torch.int32)
        keys, values = [], []
        for slot, length in enumerate(lens):
            owned = torch.tensor([order.pop() for _ in range(needed[slot])])
            table[slot, : needed[slot]] = owned
            tokens = torch.arange(length)
            block_ids, offsets = owned[tokens // block_size], tokens % block_size
            shape = (length, num_kv_heads, head_dim)
            keys.append(torch.randn(shape, generator=generator).to(dtype))
            values.append(torch.randn(shape, generator=generator).to(dtype))
            blocks[block_ids, 1, 0, offsets] = keys[-1].float()
            blocks[block_ids, 1, 1, offsets] = values[-1].float()
        layers = blocks.to(dtype).to(device)
        return PagedCache(
            tuple(keys), tuple(values), layers[:, 1, 0], layers[:, 1, 1], table.to(device)
        )


def naive_attention(q: Tensor, keys: Tensor, values: Tensor, scale: float, kv_head: int) -> Tensor:
    """One query head [head_dim] over keys and values [context, num_kv_heads, head_dim]; float64."""
    scores = keys[:, kv_head].double() @ q.double() * scale
    return torch.softmax(scores, dim=0) @ values[:, kv_head].double()


def naive_rows(
    q: Tensor,
    cache: PagedCache,
    slots: tuple[int, ...],
    contexts: tuple[int, ...],
    scale: float,
    q_per_kv: int,
    q_offset: int,
) -> Tensor:
    """Row r of q [num_rows, num_q_heads, head_dim] over contexts[r] tokens of its slot."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for row, (slot, context) in enumerate(zip(slots, contexts, strict=True)):
        keys, values = cache.keys[slot][:context], cache.values[slot][:context]
        for head in range(q.shape[1]):
            kv_head = (head + q_offset) // q_per_kv
            out[row, head] = naive_attention(q[row, head].cpu(), keys, values, scale, kv_head)
    return out


def make_chunks(
    slots: tuple[int, ...], starts: tuple[int, ...], lens: tuple[int, ...], device: torch.device
) -> PrefillChunks:
    ends = torch.tensor((0, *lens), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PrefillChunks(
        slots=torch.tensor(slots, device=device),
        starts=torch.tensor(starts, dtype=torch.int32, device=device),
        cu_lens=ends.to(device),
        max_len=max(lens),
        host_slots=slots,
        host_starts=starts,
        host_lens=lens,
    )
