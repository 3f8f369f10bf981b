"""The report: real probes on this host, and what follows from answers of hosts unlike it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.doctor import main, render, render_shards, shard_finding
from lockstep.findings import Finding, Status, package_findings, python_finding, shm_finding
from lockstep.gpu_findings import (
    driver_version,
    gpu_findings,
    nccl_findings,
    nccl_release,
    torch_findings,
    use_findings,
)
from lockstep.probes import NCCL, SHARDS, run_probe

GPU = {
    "name": "NVIDIA H100",
    "capability": [9, 0],
    "total_bytes": 80 * 2**30,
    "free_bytes": 79 * 2**30,
    "peers": [1],
}


def torch_probe(num_gpus: int, cuda: str | None = "13.0", triton: str | None = "3.6.0") -> Any:
    return {
        "version": "2.11.0",
        "cuda": cuda,
        "gpus": [GPU] * num_gpus,
        "triton": triton,
        "cpu_capability": "AVX512",
    }


@pytest.fixture
def no_driver(tmp_path: Path) -> Path:
    return tmp_path / "version"


def write_config(folder: Path, **changes: object) -> Path:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 1000,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_doctor_as_json_names_host_packages_and_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_config(tmp_path / "a model")
    assert main(["--json", "--model", str(model), "--tp", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    topics = {found["topic"] for found in report["findings"]}
    assert {"host", "package", "torch", "NCCL", "use", "model"} <= topics
    ranks = report["shards"]["ranks"]
    assert [rank["q_heads"] for rank in ranks] == [6, 3]
    assert [rank["kv_heads"] for rank in ranks] == [2, 1]
    # 2 layers x K and V x 2 heads x 64 x 4 bytes
    assert ranks[0]["kv_bytes_per_token"] == 2 * 2 * 2 * 64 * 4
    # On one rank: padded embedding, final norm, and per layer two norms, qkv, o, gate, up, down.
    layer = 2 * 576 + (9 + 2 * 3) * 64 * 576 + 576 * 576 + 3 * 1536 * 576
    assert report["shards"]["full_weight_bytes"] == 4 * (1024 * 576 + 576 + 2 * layer)


def test_a_model_that_cannot_be_split_is_refused_by_name(tmp_path: Path) -> None:
    model = write_config(tmp_path / "model", model_type="mamba")
    found = shard_finding(run_probe(SHARDS, [str(model), "2"]), str(model), 2)
    assert found.status is Status.MISSING
    assert "mamba" in found.remedy


def test_something_missing_decides_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(program: str, arguments: tuple[str, ...] = ()) -> dict[str, Any]:
        return {"missing": "x"} if program == NCCL else torch_probe(0)

    monkeypatch.setattr("lockstep.doctor.run_probe", answer)
    assert main([]) == 0
    assert main(["--model", str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--tp", "0"], ["--tp", "two"], ["--unknown"]])
def test_a_wrong_flag_is_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2


def test_a_missing_package_says_how_to_get_it() -> None:
    (found,) = package_findings(["no-such-distribution"], {})
    assert found.status is Status.MISSING
    assert "pip install no-such-distribution" in found.remedy
    (found,) = package_findings([], {"no-such-distribution": "dancing"})
    assert found.status is Status.NOTE
    assert "only dancing needs it" in found.remedy


def test_an_unsupported_python_is_missing_one() -> None:
    assert python_finding((3, 10, 4), "/p").status is Status.MISSING
    assert python_finding((3, 14, 0), "/p").status is Status.MISSING
    assert python_finding((3, 12, 1), "/p").status is Status.OK


def test_absent_or_full_shared_memory_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shm_finding(tmp_path / "absent").status is Status.NOTE
    usage = type("Usage", (), {"free": 2**20, "total": 64 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    found = shm_finding(tmp_path)
    assert (found.status, found.value) == (Status.NOTE, "1 MiB free of 64 MiB")
    assert "--shm-size" in found.remedy


def test_gpus_are_listed_with_their_peers(no_driver: Path) -> None:
    no_driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module  580.95.05  Release\n")
    findings = list(gpu_findings(torch_probe(2), no_driver, 2))
    assert findings[0].value == "580.95.05"
    assert findings[1].value == (
        "NVIDIA H100, compute capability 9.0, 79.0 GiB free of 80.0, reaches 1 of 1 peers"
    )


def test_a_gpu_that_torch_cannot_use_says_why(no_driver: Path) -> None:
    (found,) = gpu_findings(torch_probe(0, cuda=None), no_driver, 1)
    assert (found.status, found.remedy) == (
        Status.NOTE,
        "this torch is a CPU build: TORCH=cuda make setup",
    )
    (found,) = gpu_findings(torch_probe(0), no_driver, 1)
    assert "newer driver" in found.remedy


def test_no_gpu_is_no_fault(no_driver: Path) -> None:
    (found,) = gpu_findings(torch_probe(0, cuda=None), no_driver, 0)
    assert (found.status, found.value) == (Status.OK, "none: ranks run on the CPU")


def test_driver_version_without_a_known_form_is_said_to_be_unknown(no_driver: Path) -> None:
    assert driver_version(no_driver) == ""
    no_driver.write_text("something else")
    assert driver_version(no_driver) == "unknown version"


def test_missing_nccl_matters_with_several_gpus_only() -> None:
    missing = {"missing": "tried libnccl.so.2"}
    (found,) = nccl_findings(missing, torch_probe(2))
    assert found.status is Status.MISSING
    assert "nvidia-nccl-cu13" in found.remedy
    for num_gpus in (0, 1):
        (found,) = nccl_findings(missing, torch_probe(num_gpus))
        assert found.status is Status.OK


def test_missing_torch_and_missing_triton_are_named() -> None:
    (found,) = torch_findings({"failed": "ModuleNotFoundError: No module named 'torch'"})
    assert found.status is Status.MISSING
    *_, found = torch_findings(torch_probe(1, triton=None))
    assert (found.item, found.status) == ("triton", Status.MISSING)


def test_what_will_be_used_follows_from_gpus_and_nccl() -> None:
    on_gpus = [found.value for found in use_findings(torch_probe(2), {"version": 22809})]
    assert on_gpus == ["GPUs, up to 2 ranks", "NCCL 2.28.9"]
    on_cpu = [found.value for found in use_findings(torch_probe(0), {"failed": "x"})]
    assert on_cpu[0].startswith("CPU, ")


def test_nccl_numbers_are_read_as_nccl_h_writes_them() -> None:
    assert nccl_release(22809) == "2.28.9"
    assert nccl_release(23201) == "2.32.1"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise ValueError('planted')", "ValueError: planted"),
        ("print('no json')", "printed no JSON but 'no json'"),
        ("import os; os._exit(7)", "exit status 7"),
        ("import time; time.sleep(60)", "no answer within 0.5 s"),
    ],
)
def test_a_probe_that_fails_says_so_in_one_line(program: str, reason: str) -> None:
    assert run_probe(program, limit_s=0.5 if "sleep" in program else 60) == {"failed": reason}


def test_tables_line_up_and_remedies_follow_their_line() -> None:
    lines = render(
        [Finding("host", "a", "1"), Finding("package", "longer", "2", Status.MISSING, "get it")]
    ).splitlines()
    assert lines[0] == "host     a       ok       1"
    assert lines[1] == "package  longer  missing  2"
    assert lines[2].strip() == "-> get it"


def test_the_largest_shard_is_set_against_an_even_split() -> None:
    rank = {"rank": 0, "q_heads": 6, "kv_heads": 2, "ffn": 64, "vocab": 64}
    ranks = [
        rank | {"weight_bytes": 600, "kv_bytes_per_token": 2048},
        rank | {"rank": 1, "weight_bytes": 400, "kv_bytes_per_token": 1024},
    ]
    shards = {"family": "llama", "dtype": "float32", "full_weight_bytes": 1000, "ranks": ranks}
    found = shard_finding(shards, "/models/tiny", 2)
    assert found.item == "tiny on 2 ranks"
    assert "60.0% of the model (an even split would be 50.0%)" in found.value
    assert render_shards(shards).splitlines()[-1].split()[:3] == ["1", "6", "2"]
