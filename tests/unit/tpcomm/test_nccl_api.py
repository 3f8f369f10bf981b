"""The ctypes table against its prototypes, and against the real libnccl, which needs no GPU."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from tpcomm import NcclError, nccl_api
from tpcomm.nccl_api import (
    FUNCTIONS,
    OPTIONAL_FUNCTIONS,
    UNDEFINED_INT,
    DataType,
    Nccl,
    NcclConfig,
    NcclUniqueId,
    RedOp,
    default_config,
)
from tpcomm.nccl_loader import load_nccl

# `(\w+) (name)(arguments)` in comment lines directly above `("name", (...)),`
_ROW = re.compile(r"((?:^    #.*\n)+)^    \(\"(\w+)\"", re.MULTILINE)
_CTYPES = {
    "int": ctypes.c_int,
    "size_t": ctypes.c_size_t,
    "ncclUniqueId": NcclUniqueId,
    "ncclResult_t": ctypes.c_int,
    "ncclDataType_t": ctypes.c_int,
    "ncclRedOp_t": ctypes.c_int,
    "ncclComm_t": ctypes.c_void_p,
    "ncclWindow_t": ctypes.c_void_p,
    "cudaStream_t": ctypes.c_void_p,
    "void*": ctypes.c_void_p,
    "void**": ctypes.POINTER(ctypes.c_void_p),
    "int*": ctypes.POINTER(ctypes.c_int),
    "ncclResult_t*": ctypes.POINTER(ctypes.c_int),
    "ncclUniqueId*": ctypes.POINTER(NcclUniqueId),
    "ncclConfig_t*": ctypes.POINTER(NcclConfig),
    "ncclComm_t*": ctypes.POINTER(ctypes.c_void_p),
    "ncclWindow_t*": ctypes.POINTER(ctypes.c_void_p),
}


@pytest.fixture(scope="module")
def nccl() -> Nccl:
    return load_nccl()


def _prototypes() -> dict[str, list[str]]:
    """Function name -> C types of its parameters, from the comments of the table."""
    found = {}
    for comment, row_name in _ROW.findall(Path(nccl_api.__file__).read_text()):
        text = " ".join(line.strip().lstrip("#").strip() for line in comment.splitlines())
        match = re.fullmatch(r"(?:ncclResult_t|const char\*) (\w+)\((.*)\)", text)
        assert match is not None, text
        assert match[1] == row_name
        parameters = [part.strip() for part in match[2].split(",") if part.strip()]
        found[row_name] = [p.removeprefix("const ").rsplit(" ", 1)[0] for p in parameters]
    return found


def test_argument_types_equal_the_prototypes() -> None:
    prototypes = _prototypes()
    assert set(prototypes) == {name for name, _ in FUNCTIONS + OPTIONAL_FUNCTIONS}
    for name, argtypes in FUNCTIONS + OPTIONAL_FUNCTIONS:
        assert [_CTYPES[c_type] for c_type in prototypes[name]] == list(argtypes), name


def test_struct_layouts_are_those_of_the_header() -> None:
    # Offsets compiled by gcc from nccl.h of release 2.28.9.
    offsets = {
        "size": 0,
        "magic": 8,
        "version": 12,
        "blocking": 16,
        "cgaClusterSize": 20,
        "minCTAs": 24,
        "maxCTAs": 28,
        "netName": 32,
        "splitShare": 40,
        "trafficClass": 44,
        "commName": 48,
        "collnetEnable": 56,
        "CTAPolicy": 60,
        "shrinkShare": 64,
        "nvlsCTAs": 68,
        "nChannelsPerNetPeer": 72,
        "nvlinkCentricSched": 76,
    }
    assert {field[0]: getattr(NcclConfig, field[0]).offset for field in NcclConfig._fields_} == (
        offsets
    )
    assert ctypes.sizeof(NcclConfig) == 80
    assert ctypes.sizeof(NcclUniqueId) == 128
    assert [t.value for t in DataType] == list(range(12))
    assert [op.name for op in RedOp] == ["SUM", "PROD", "MAX", "MIN", "AVG"]


def test_default_config_leaves_everything_to_nccl_but_blocking() -> None:
    config = default_config()
    assert (config.size, config.magic, config.version) == (80, 0xCAFEBEEF, 22809)
    assert config.blocking == 1
    assert config.minCTAs == config.nvlinkCentricSched == UNDEFINED_INT
    assert config.netName is None and config.commName is None


def test_library_answers_its_version_and_file(nccl: Nccl) -> None:
    assert nccl.version >= 22700
    assert Path(nccl.path).name.startswith("libnccl.so")


def test_unique_ids_are_128_bytes_and_differ(nccl: Nccl) -> None:
    first, second = nccl.get_unique_id(), nccl.get_unique_id()
    assert len(first) == len(second) == 128
    assert first != second


def test_error_carries_code_text_and_function(nccl: Nccl) -> None:
    with pytest.raises(NcclError, match="invalid argument") as caught:
        nccl.function("ncclAllReduce")(None, None, 1, DataType.FLOAT32, RedOp.SUM, None, None)
    assert caught.value.code == 4
    assert caught.value.function == "ncclAllReduce"
    assert "comm argument is NULL" in caught.value.text


def test_harmless_calls_on_null_succeed(nccl: Nccl) -> None:
    nccl.function("ncclGroupStart")()
    nccl.function("ncclGroupEnd")()
    nccl.function("ncclCommAbort")(None)


def test_function_of_a_newer_release_is_refused_by_name(nccl: Nccl) -> None:
    assert not nccl.has("ncclNotInvented")
    with pytest.raises(NcclError, match=f"NCCL {nccl.version}") as caught:
        nccl.function("ncclNotInvented")
    assert caught.value.function == "ncclNotInvented"


def test_wrong_argument_types_are_caught_by_the_table(nccl: Nccl) -> None:
    with pytest.raises(ctypes.ArgumentError):
        nccl.function("ncclCommAbort")(1.5)
