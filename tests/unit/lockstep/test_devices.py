"""Which device a rank gets."""

import os
from pathlib import Path

import pytest

from lockstep.devices import choose_devices, count_gpus
from lockstep.errors import ConfigError


def test_without_gpus_every_rank_is_on_the_cpu() -> None:
    assert choose_devices(None, 3, num_gpus=0) == ("cpu",) * 3


def test_with_gpus_ranks_take_them_in_order() -> None:
    assert choose_devices(None, 2, num_gpus=4) == ("cuda:0", "cuda:1")


def test_named_gpus_are_taken_as_named() -> None:
    assert choose_devices("3,1", 2, num_gpus=4) == ("cuda:3", "cuda:1")


def test_cpu_can_be_chosen_beside_gpus() -> None:
    assert choose_devices("cpu", 2, num_gpus=4) == ("cpu", "cpu")


@pytest.mark.parametrize(
    ("wanted", "num_ranks", "words"),
    [
        (None, 3, ["--tp is 3", "2 GPUs"]),
        ("0", 2, ["1 GPUs", "--tp is 2"]),
        ("0,7", 2, ["GPU 7", "2 GPUs"]),
        ("0,0", 2, ["'0,0'", "different"]),
        ("gpu", 1, ["'gpu'", "cpu or"]),
    ],
)
def test_what_does_not_fit_is_refused_naming_both_sides(
    wanted: str | None, num_ranks: int, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_devices(wanted, num_ranks, num_gpus=2)
    assert all(word in str(caught.value) for word in words)


def _fake_nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_gpus_are_counted_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "printf 'GPU 0: NVIDIA H200 (UUID: a)\\nGPU 1: NVIDIA H200 (UUID: b)\\n  MIG x\\n'"
    _fake_nvidia_smi(tmp_path, listing, monkeypatch)
    assert count_gpus({}) == 2
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "1"}) == 1
    assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "0,-1,1"}) == 1


def test_driver_that_is_not_loaded_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_nvidia_smi(tmp_path, "echo NVIDIA-SMI has failed; exit 9", monkeypatch)
    assert count_gpus({}) == 0


def test_without_nvidia_smi_device_nodes_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert count_gpus({}, dev=tmp_path) == 2
