"""Staging buffers without a GPU."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from tests.unit.tpcomm.fake_driver import FakeDriver
from tests.unit.tpcomm.triton_programs import needs_triton, run_program
from tpcomm import CommError, triton_language
from tpcomm.cuda_driver import CudaDriver
from tpcomm.staging import Staging, host_identity


@needs_triton
def test_buffers_are_exchanged_used_and_aborted_between_processes() -> None:
    run_program("interpreted_staging", TRITON_INTERPRET="1")


def _make(staging_bytes: int) -> Staging:
    device = torch.device("cuda", 0)
    return Staging(0, 2, device, staging_bytes, cast(CudaDriver, FakeDriver()))


def test_without_triton_staging_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_language, "HAS_TRITON", False)
    with pytest.raises(CommError, match="'triton' is not installed"):
        _make(1 << 20)


def test_size_below_one_chunk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_language, "HAS_TRITON", True)
    with pytest.raises(CommError, match="2047 is below one chunk of 2048"):
        _make(2047)


def test_host_identity_is_stable_and_fits_int64() -> None:
    assert host_identity() == host_identity()
    assert -(2**63) <= host_identity() < 2**63
