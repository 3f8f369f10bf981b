"""The ctypes table of libcuda against its prototypes and struct layouts; no driver is needed."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from tpcomm import CommError, cuda_driver
from tpcomm.cuda_driver import (
    FUNCTIONS,
    MemAccessDesc,
    MemAllocationProp,
    allocation_prop,
    load_cuda_driver,
)

_ROW = re.compile(r"((?:^    #.*\n)+)^    \(\"(\w+)\"", re.MULTILINE)
_U64 = ctypes.c_uint64
_CTYPES = {
    "unsigned int": ctypes.c_uint,
    "unsigned long long": _U64,
    "CUdeviceptr": _U64,
    "CUmemGenericAllocationHandle": _U64,
    "size_t": ctypes.c_size_t,
    "CUresult": ctypes.c_int,
    "CUmemAllocationGranularity_flags": ctypes.c_int,
    "CUmemAllocationHandleType": ctypes.c_int,
    "void*": ctypes.c_void_p,
    "char**": ctypes.POINTER(ctypes.c_char_p),
    "size_t*": ctypes.POINTER(ctypes.c_size_t),
    "CUdeviceptr*": ctypes.POINTER(_U64),
    "CUmemGenericAllocationHandle*": ctypes.POINTER(_U64),
    "CUmemAllocationProp*": ctypes.POINTER(MemAllocationProp),
    "CUmemAccessDesc*": ctypes.POINTER(MemAccessDesc),
}


def test_argument_types_equal_the_prototypes() -> None:
    rows = dict(FUNCTIONS)
    seen = set()
    for comment, name in _ROW.findall(Path(cuda_driver.__file__).read_text()):
        text = " ".join(line.strip().lstrip("#").strip() for line in comment.splitlines())
        match = re.fullmatch(r"CUresult (\w+)\((.*)\)", text)
        assert match is not None, text
        assert match[1] == name
        types = [p.strip().removeprefix("const ").rsplit(" ", 1)[0] for p in match[2].split(",")]
        assert [_CTYPES[c_type] for c_type in types] == list(rows[name]), name
        seen.add(name)
    assert seen == set(rows)


def test_struct_layouts_are_those_of_the_header() -> None:
    # sizeof and offsetof in cuda.h, CUDA 12 and 13, x86-64.
    assert ctypes.sizeof(MemAllocationProp) == 32
    assert MemAllocationProp.location.offset == 8
    assert MemAllocationProp.win32HandleMetaData.offset == 16
    assert MemAllocationProp.allocFlags.offset == 24
    assert ctypes.sizeof(MemAccessDesc) == 12
    assert MemAccessDesc.flags.offset == 8


def test_allocation_is_pinned_on_its_device_and_exportable_as_asked() -> None:
    prop = allocation_prop(3, exportable=True)
    assert (prop.type, prop.requestedHandleTypes) == (1, 1)
    assert (prop.location.type, prop.location.id) == (1, 3)
    assert allocation_prop(0, exportable=False).requestedHandleTypes == 0


def test_missing_driver_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_SONAME", "libcuda-nowhere.so.1")
    with pytest.raises(CommError, match=r"libcuda-nowhere\.so\.1.*install the NVIDIA driver"):
        load_cuda_driver()
