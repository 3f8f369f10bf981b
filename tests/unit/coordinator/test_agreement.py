"""What ranks must agree on."""

import pytest

from coordinator.agreement import agreed, check_preflights, choose_comm, path_lines
from coordinator.errors import StartRefused
from protos.lockstep.v1 import worker_pb2


def hello(uuid: str = "", boot: str = "one") -> worker_pb2.HelloResponse:
    return worker_pb2.HelloResponse(device_uuid=uuid, boot_id=boot)


@pytest.mark.parametrize(
    ("hellos", "comm"),
    [
        ([hello("GPU-1"), hello("GPU-2", "two")], "nccl"),
        ([hello(), hello()], "shm"),
        ([hello(), hello(boot="two")], "gloo"),
        ([hello()], "shm"),
    ],
)
def test_comm_auto_follows_devices_and_hosts(
    hellos: list[worker_pb2.HelloResponse], comm: str
) -> None:
    assert choose_comm(hellos) == comm


def test_comm_by_choice_must_suit_the_devices() -> None:
    cpus, gpus = [hello(), hello()], [hello("GPU-1"), hello("GPU-2")]
    assert choose_comm(cpus, "gloo") == "gloo"
    assert choose_comm(gpus, "nccl") == "nccl"
    with pytest.raises(StartRefused, match="--comm nccl .* CPUs.* shm or gloo"):
        choose_comm(cpus, "nccl")
    with pytest.raises(StartRefused, match="--comm shm .* GPUs.* nccl"):
        choose_comm(gpus, "shm")


def test_a_mix_of_cpu_and_gpu_is_refused() -> None:
    with pytest.raises(StartRefused, match="rank 1 runs on CPU and rank 0 on a GPU"):
        choose_comm([hello("GPU-1"), hello()])


def test_values_that_differ_name_both_ranks() -> None:
    assert agreed("x", [1, 1]) == 1
    with pytest.raises(StartRefused, match="rank 2 has x 5, rank 0 4; ranks must agree"):
        agreed("x", [4, 4, 5])


def preflight(**usable: bool) -> worker_pb2.PreflightResponse:
    return worker_pb2.PreflightResponse(
        paths=[
            worker_pb2.PathReport(path=path, is_usable=is_usable, detail="" if is_usable else "sum")
            for path, is_usable in usable.items()
        ]
    )


def test_one_usable_path_is_enough_and_none_is_refused_with_the_reasons() -> None:
    check_preflights([preflight(staged=False, nccl=True)] * 2)
    with pytest.raises(StartRefused, match="no communication path is usable: staged: sum"):
        check_preflights([preflight(staged=False)] * 2)


def test_ranks_that_see_different_paths_are_refused() -> None:
    with pytest.raises(StartRefused, match="rank 1 has paths"):
        check_preflights([preflight(nccl=True), preflight(nccl=False)])


def test_paths_are_told_with_their_times_and_what_they_serve() -> None:
    time = worker_pb2.PathTime(byte_count=8192, microseconds=3.94)
    response = worker_pb2.PreflightResponse(
        paths=[
            worker_pb2.PathReport(
                operation="all_reduce", path="one_shot", is_usable=True, times=[time]
            ),
            worker_pb2.PathReport(operation="all_reduce", path="nccl", detail="wrong sum"),
        ],
        routes=[
            worker_pb2.PathRoute(operation="all_reduce", max_byte_count=65536, path="one_shot")
        ],
    )
    assert path_lines(response) == [
        "communication path all_reduce by one_shot: usable, 8192 B 3.9 us",
        "communication path all_reduce by nccl: off, wrong sum",
        "chosen for all_reduce: one_shot to 65536 B",
    ]


def test_ranks_with_different_routes_are_refused() -> None:
    first, second = preflight(nccl=True), preflight(nccl=True)
    second.routes.add(operation="all_reduce", max_byte_count=1, path="nccl")
    with pytest.raises(StartRefused, match="rank 1 has routes"):
        check_preflights([first, second])
