"""What ranks must agree on before they work together; a difference stops the start by name."""

import logging
from collections.abc import Sequence
from typing import Any

from coordinator.errors import StartRefused
from coordinator.worker_group import WorkerClient
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.version import __version__
from protos.lockstep.v1 import worker_pb2

_LOG = logging.getLogger(__name__)


def choose_comm(hellos: Sequence[worker_pb2.HelloResponse], wanted: str = "auto") -> str:
    """What is wanted, or for "auto": NCCL between GPUs, shared memory between CPU ranks of one
    host, gloo between CPU hosts. Raises StartRefused where the ranks' devices cannot do it.
    """
    on_gpu = [bool(hello.device_uuid) for hello in hellos]
    if any(on_gpu) and not all(on_gpu):
        raise StartRefused(
            ExitCode.CONFIG,
            f"rank {on_gpu.index(False)} runs on CPU and rank {on_gpu.index(True)} on a GPU; "
            f"start all workers with the same kind of --device",
        )
    if wanted != "auto" and (wanted == "nccl") != all(on_gpu):
        kinds, fitting = ("GPUs", "nccl") if all(on_gpu) else ("CPUs", "shm or gloo")
        raise StartRefused(
            ExitCode.CONFIG,
            f"--comm {wanted} does not work between {kinds}, where the ranks run; "
            f"choose auto or {fitting}, or other --devices",
        )
    if wanted != "auto":
        return wanted
    if all(on_gpu):
        return "nccl"
    return "shm" if len({hello.boot_id for hello in hellos}) == 1 else "gloo"


def check_hellos(
    hellos: Sequence[worker_pb2.HelloResponse], workers: Sequence[WorkerClient], digest: str
) -> None:
    """Versions and checkpoints agree and no GPU serves two ranks; raises StartRefused."""
    seen: dict[str, int] = {}
    for rank, (hello, worker) in enumerate(zip(hellos, workers, strict=True)):
        where = f"rank {rank} at {worker.address}"
        if hello.version != __version__:
            raise StartRefused(
                ExitCode.CONFIG,
                f"{where} is version {hello.version}, the coordinator {__version__}",
            )
        if hello.model_digest != digest:
            raise StartRefused(
                ExitCode.CHECKPOINT,
                f"{where} holds a checkpoint with digest {hello.model_digest[:16]}, the "
                f"coordinator's is {digest[:16]}; --model must name the same files",
            )
        if hello.device_uuid and hello.device_uuid in seen:
            raise StartRefused(
                ExitCode.CONFIG,
                f"ranks {seen[hello.device_uuid]} and {rank} run on one GPU, "
                f"{hello.device_uuid}; give each worker its own --device",
            )
        seen[hello.device_uuid] = rank


def agreed(field: str, values: Sequence[Any]) -> Any:
    """The value that all ranks named; raises StartRefused naming the first that differs."""
    for rank, value in enumerate(values):
        if value != values[0]:
            raise StartRefused(
                ExitCode.DEVICE,
                f"rank {rank} has {field} {value}, rank 0 {values[0]}; ranks must agree",
            )
    return values[0]


def check_preflights(preflights: Sequence[worker_pb2.PreflightResponse]) -> None:
    """The same paths work on every rank, and one at least does; raises StartRefused."""
    ways = [
        [(path.operation, path.path, path.is_usable) for path in answer.paths]
        for answer in preflights
    ]
    agreed("paths", ways)
    agreed("routes", [list(answer.routes) for answer in preflights])
    for line in path_lines(preflights[0]):
        _LOG.info("%s", line)
    if ways[0] and not any(is_usable for *_, is_usable in ways[0]):
        reasons = "; ".join(f"{path.path}: {path.detail}" for path in preflights[0].paths)
        raise StartRefused(ExitCode.DEVICE, f"no communication path is usable: {reasons}")


def path_lines(preflight: worker_pb2.PreflightResponse) -> list[str]:
    """Each path with its verdict and times, then which one serves which sizes."""
    lines = []
    for path in preflight.paths:
        verdict = "usable" if path.is_usable else "off"
        times = ", ".join(f"{time.byte_count} B {time.microseconds:.1f} us" for time in path.times)
        name = f"{path.operation} by {path.path}" if path.operation else path.path
        lines.append(f"communication path {name}: {verdict}, {times or path.detail}")
    for operation in dict.fromkeys(route.operation for route in preflight.routes):
        steps = [
            f"{route.path} to {route.max_byte_count} B"
            for route in preflight.routes
            if route.operation == operation
        ]
        lines.append(f"chosen for {operation}: {', '.join(steps)}")
    return lines
