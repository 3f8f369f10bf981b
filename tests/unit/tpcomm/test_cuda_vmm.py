"""Memory behind fixed addresses, over a double of libcuda's books."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from tests.unit.tpcomm.fake_driver import GRANULARITY, FakeDriver
from tpcomm import CommError, CudaDriverError
from tpcomm.cuda_driver import CudaDriver
from tpcomm.cuda_vmm import SharedAllocation, VirtualRange

DEVICE = torch.device("cuda", 0)


def _range(driver: FakeDriver, reserve_bytes: int) -> VirtualRange:
    return VirtualRange(reserve_bytes, DEVICE, driver=cast(CudaDriver, driver))


def _shared(driver: FakeDriver, fd: int | None = None) -> SharedAllocation:
    return SharedAllocation(GRANULARITY, DEVICE, cast(CudaDriver, driver), fd)


def test_sizes_are_rounded_to_granularity_and_grow_behind_one_address() -> None:
    driver = FakeDriver()
    memory = _range(driver, 5 * GRANULARITY - 1)
    assert memory.reserve_bytes == 5 * GRANULARITY
    assert memory.granularity == GRANULARITY
    address = memory.address
    assert memory.map_more(1) == GRANULARITY
    assert memory.map_more(2 * GRANULARITY + 1) == memory.mapped_bytes == 4 * GRANULARITY
    assert memory.address == address
    assert sorted(driver.mapped) == [address, address + GRANULARITY]


def test_mapping_beyond_the_reservation_is_refused() -> None:
    memory = _range(FakeDriver(), 2 * GRANULARITY)
    memory.map_more(GRANULARITY)
    with pytest.raises(CommError, match=f"{GRANULARITY} of {2 * GRANULARITY} reserved"):
        memory.map_more(GRANULARITY + 1)
    with pytest.raises(CommError, match="cannot map 0 bytes"):
        memory.map_more(0)


def test_out_of_memory_maps_nothing_and_leaves_the_range_usable() -> None:
    driver = FakeDriver(free_bytes=3 * GRANULARITY)
    memory = _range(driver, 10 * GRANULARITY)
    memory.map_more(2 * GRANULARITY)
    with pytest.raises(CudaDriverError, match="cuMemCreate returned 2: out of memory"):
        memory.map_more(2 * GRANULARITY)
    assert memory.mapped_bytes == 2 * GRANULARITY
    assert memory.map_more(GRANULARITY) == 3 * GRANULARITY


def test_failed_mapping_gives_the_memory_back() -> None:
    driver = FakeDriver(free_bytes=GRANULARITY)
    memory = _range(driver, GRANULARITY)
    driver.fail_map = True
    with pytest.raises(CudaDriverError, match="cuMemSetAccess"):
        memory.map_more(1)
    driver.fail_map = False
    driver.call("cuMemRelease", -1)
    assert memory.map_more(1) == GRANULARITY


def test_close_returns_memory_and_addresses_once() -> None:
    driver = FakeDriver()
    before = driver.free_bytes
    memory = _range(driver, 4 * GRANULARITY)
    memory.map_more(GRANULARITY)
    memory.map_more(GRANULARITY)
    memory.close()
    memory.close()
    assert driver.free_bytes == before
    assert not driver.mapped and not driver.reserved


@pytest.mark.parametrize(
    ("shape", "offset"),
    [((4,), 2), ((4,), -4), ((4,), GRANULARITY), ((GRANULARITY,), 0), ((0,), 0)],
)
def test_tensors_outside_the_range_are_refused(shape: tuple[int, ...], offset: int) -> None:
    memory = _range(FakeDriver(), 2 * GRANULARITY)
    memory.map_more(GRANULARITY)
    with pytest.raises(ValueError, match="offset"):
        memory.as_tensor(shape, torch.float32, offset)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_device_must_be_one_gpu(device: str) -> None:
    with pytest.raises(ValueError, match="name one CUDA device"):
        VirtualRange(GRANULARITY, torch.device(device), driver=cast(CudaDriver, FakeDriver()))


def test_shared_allocation_is_freed_when_closed() -> None:
    driver = FakeDriver()
    before = driver.free_bytes
    own, peer = _shared(driver), _shared(driver, fd=3)
    assert own.address != peer.address
    own.close()
    peer.close()
    peer.close()
    assert driver.free_bytes == before
    assert not driver.handles and not driver.mapped and not driver.reserved


def test_unreachable_peer_leaves_nothing_behind() -> None:
    driver = FakeDriver(fail_map=True)
    with pytest.raises(CudaDriverError, match="invalid device"):
        _shared(driver, fd=3)
    assert not driver.handles and not driver.reserved
