"""How much memory there is, and who took it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_CPU_KV_BYTES = 4 << 30
_CUDA_RESERVE_BYTES = 1 << 30


class DeviceMemory:
    """The ledger of one process's device memory, in bytes by kind.

    On CUDA a kind is charged with what became less free on the device while it was made; on CPU
    only weights and KV cache are charged (by their owner, with their own sizes).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.by_kind: dict[str, int] = {}

    @contextmanager
    def counted(self, kind: str) -> Iterator[None]:
        """Charges `kind` with the memory that the body takes."""
        before = self.free_bytes
        yield
        if self._device.type == "cuda":
            self.by_kind[kind] = max(0, before - self.free_bytes)

    @property
    def free_bytes(self) -> int:
        """Free memory of the device, or what the host can still give without swapping."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return int(torch.cuda.mem_get_info(self._device)[0])
        return available_host_bytes()

    @property
    def total_bytes(self) -> int:
        """All memory of the device, or what the host can still give."""
        if self._device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._device)[1])
        return available_host_bytes()

    def kv_budget(self, fraction: float, world_size: int) -> tuple[int, int]:
        """(bytes that the KV cache may take from, bytes to keep back).

        CUDA: `fraction` of the device less all that is taken already, keeping 1 GiB for what eager
        steps allocate. CPU: at most 4 GiB, and at most a quarter of what is free, over the ranks of
        the host.
        """
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            taken = self.total_bytes - self.free_bytes
            return int(self.total_bytes * fraction) - taken, _CUDA_RESERVE_BYTES
        return min(_CPU_KV_BYTES, self.free_bytes // (4 * world_size)), 0


def available_host_bytes() -> int:
    """MemAvailable, lowered to what the cgroup (v2) leaves."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        raise OSError("/proc/meminfo has no MemAvailable")
    limit, current = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and current.is_file():
        text = limit.read_text(encoding="ascii").strip()
        if text != "max":
            available = min(available, int(text) - int(current.read_text(encoding="ascii")))
    return available
