"""Which messages the kernels over staging memory take."""

from __future__ import annotations

import torch

from tpcomm.allreduce_kernels import fits_one_shot, fits_two_shot
from tpcomm.gather_kernel import fits_gather
from tpcomm.norm_kernel import fits_add_rms_norm
from tpcomm.staging_tables import (
    CHUNK_BYTES,
    NUM_WARPS,
    WARPS_PER_MULTIPROCESSOR,
    StagingTables,
    make_tables,
)

CPU = torch.device("cpu")
SLOT_BYTES = 4 << 20


def tables(num_multiprocessors: int, world_size: int = 2) -> StagingTables:
    warps = WARPS_PER_MULTIPROCESSOR * num_multiprocessors
    return make_tables(world_size, 0, SLOT_BYTES, CPU, warps)


def halves(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes // 2, dtype=torch.bfloat16)


def test_no_call_has_more_polling_warps_than_the_device_is_trusted_with() -> None:
    hopper = tables(132)
    wave = 132 * WARPS_PER_MULTIPROCESSOR // NUM_WARPS * CHUNK_BYTES
    assert fits_one_shot(halves(wave), hopper)
    assert not fits_one_shot(halves(wave + 2), hopper)
    assert not fits_one_shot(halves(SLOT_BYTES), hopper)  # 2,048 programs: these hung
    assert fits_two_shot(halves(SLOT_BYTES), hopper)
    assert not fits_two_shot(halves(SLOT_BYTES), tables(64))
    assert fits_gather(torch.empty(wave // 2, dtype=torch.uint8), hopper)
    assert not fits_gather(torch.empty(SLOT_BYTES // 2, dtype=torch.uint8), hopper)
    assert fits_add_rms_norm(torch.empty(264, 4096, dtype=torch.bfloat16), hopper)
    assert not fits_add_rms_norm(torch.empty(530, 4096, dtype=torch.bfloat16), hopper)


def test_no_message_is_larger_than_its_slot() -> None:
    unlimited = make_tables(2, 0, SLOT_BYTES, CPU)
    assert fits_one_shot(halves(SLOT_BYTES), unlimited)
    assert not fits_one_shot(halves(SLOT_BYTES + 2), unlimited)
    assert not fits_one_shot(torch.empty(0), unlimited)
    assert not fits_two_shot(torch.empty(8, dtype=torch.int32), unlimited)
