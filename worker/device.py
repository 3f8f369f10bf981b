"""The device this process computes on: is it there, who is it, how many threads may it use."""

from __future__ import annotations

import os

import torch

from worker.config import WorkerConfig
from worker.errors import DeviceError


def prepare_device(config: WorkerConfig) -> None:
    """Selects the device; raises DeviceError when it is not there.

    float32 models are computed in float32 (no TF32), so that ranks and degrees agree.
    """
    torch.set_grad_enabled(False)
    torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
    if config.device == "cpu":
        return
    index = int(config.device.partition(":")[2])
    if not torch.cuda.is_available():
        raise DeviceError(f"--device {config.device}: torch {torch.__version__} sees no GPU")
    if index >= torch.cuda.device_count():
        raise DeviceError(
            f"--device {config.device}: this host has {torch.cuda.device_count()} GPUs, numbered"
            " from 0"
        )
    select_device(torch.device(config.device))
    torch.backends.cuda.matmul.allow_tf32 = False


def select_device(device: torch.device) -> None:
    """Makes `device` the calling thread's current one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def device_identity(device: torch.device) -> tuple[str, str]:
    """(name, UUID) of the device; ("cpu", "") on CPU."""
    if device.type == "cpu":
        return "cpu", ""
    properties = torch.cuda.get_device_properties(device)
    return properties.name, str(properties.uuid)
