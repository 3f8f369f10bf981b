"""libcuda's memory calls played on the host: addresses are numbers, nothing is behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tpcomm import CudaDriverError

GRANULARITY = 2 << 20


@dataclass
class FakeDriver:
    """Keeps the books that CUDA keeps, and refuses what CUDA would refuse.

    free_bytes: what the device has left. fail_map: make the next mapping fail, as it does for a
    peer that cannot be reached.
    """

    free_bytes: int = 64 << 20
    fail_map: bool = False
    handles: dict[int, int] = field(default_factory=dict)
    reserved: dict[int, int] = field(default_factory=dict)
    mapped: dict[int, tuple[int, int]] = field(default_factory=dict)
    released: set[int] = field(default_factory=set)
    num_created: int = 0

    def granularity(self, device: int, *, exportable: bool) -> int:
        return GRANULARITY

    def reserve(self, num_bytes: int, alignment: int) -> int:
        assert num_bytes % GRANULARITY == 0
        address = 0x7000_0000_0000 + sum(self.reserved.values())
        self.reserved[address] = num_bytes
        return address

    def create(self, num_bytes: int, device: int, *, exportable: bool) -> int:
        assert num_bytes % GRANULARITY == 0
        if num_bytes > self.free_bytes:
            raise CudaDriverError(2, "out of memory", "cuMemCreate")
        self.free_bytes -= num_bytes
        self.num_created += 1
        self.handles[self.num_created] = num_bytes
        return self.num_created

    def import_fd(self, fd: int) -> int:
        self.num_created += 1
        self.handles[self.num_created] = 0
        return self.num_created

    def map(self, address: int, num_bytes: int, handle: int, device: int) -> None:
        if self.fail_map:
            raise CudaDriverError(101, "invalid device ordinal", "cuMemSetAccess")
        assert any(a <= address and address + num_bytes <= a + n for a, n in self.reserved.items())
        assert all(
            address + num_bytes <= a or a + n <= address for a, (n, _) in self.mapped.items()
        )
        self.mapped[address] = (num_bytes, handle)

    def call(self, name: str, *arguments: Any) -> None:
        if name == "cuMemRelease":
            self.released.add(arguments[0])
        elif name == "cuMemUnmap":
            assert self.mapped.pop(arguments[0])[0] == arguments[1]
        elif name == "cuMemAddressFree":
            begin, size = arguments
            assert not [a for a in self.mapped if begin <= a < begin + size]
            assert self.reserved.pop(begin) == size
        else:
            raise AssertionError(name)
        self._free_what_nobody_holds()

    def _free_what_nobody_holds(self) -> None:
        in_use = {handle for _, handle in self.mapped.values()}
        for handle in [h for h in self.handles if h in self.released and h not in in_use]:
            self.free_bytes += self.handles.pop(handle)
