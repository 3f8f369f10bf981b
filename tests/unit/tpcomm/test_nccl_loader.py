"""Where libnccl is looked for, and what is said when it is nowhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tpcomm import NcclNotFound, create_group_id, nccl_loader
from tpcomm.group_id import parse_group_id
from tpcomm.nccl_loader import load_nccl, nccl_environment


def test_override_is_used_and_reported() -> None:
    found = load_nccl().path
    assert os.path.samefile(load_nccl(found).path, found)


def test_missing_override_is_an_error_and_nothing_else_is_tried(tmp_path: Path) -> None:
    missing = str(tmp_path / "libnccl.so.2")
    with pytest.raises(NcclNotFound, match="cannot open shared object") as caught:
        load_nccl(missing)
    assert len(caught.value.tried) == 1
    assert missing in caught.value.tried[0]


def test_a_library_that_is_not_nccl_is_refused() -> None:
    with pytest.raises(NcclNotFound, match="ncclGetVersion"):
        load_nccl("libc.so.6")


def test_every_place_is_named_when_none_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_loader, "_SONAME", "libnccl-nowhere.so.2")
    with pytest.raises(NcclNotFound) as caught:
        load_nccl()
    assert len(caught.value.tried) >= 3
    assert "nvidia/nccl/lib" in str(caught.value)
    assert "nvidia-nccl-cu13" in str(caught.value)


def test_group_id_carries_ncclUniqueId() -> None:
    group = parse_group_id(create_group_id("nccl"), "nccl")
    assert len(bytes.fromhex(group.nccl_id)) == 128


def test_environment_keeps_what_the_operator_set() -> None:
    wanted = nccl_environment({"NCCL_NVLS_ENABLE": "1", "HOME": "/"})
    assert "NCCL_NVLS_ENABLE" not in wanted
    assert wanted["NCCL_GRAPH_REGISTER"] == "0"
    assert nccl_environment({})["NCCL_NVLS_ENABLE"] == "0"
