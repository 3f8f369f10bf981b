"""Finding libnccl on this machine, and the environment it should run in."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator, Mapping
from ctypes import POINTER, c_char_p, c_void_p
from pathlib import Path
from typing import Any

from tpcomm.errors import NcclNotFound
from tpcomm.nccl_api import Nccl

_SONAME = "libnccl.so.2"


def load_nccl(path: str | None = None) -> Nccl:
    """Load libnccl: `path` if given, and nothing else then; otherwise the copy torch has loaded,
    the nvidia-nccl wheel, the system's, in this order.

    Raises:
        NcclNotFound: with every place tried and the linker's reason.
    """
    tried = []
    for place, mode in _candidates(path):
        try:
            library = ctypes.CDLL(place, mode=mode)
            return Nccl(library, _file_of(library.ncclGetVersion))
        except (OSError, AttributeError) as error:
            tried.append(f"{place}: {error}")
    raise NcclNotFound(tried)


def nccl_environment(existing: Mapping[str, str]) -> dict[str, str]:
    """Settings a process should have before its first NCCL call, less those it has already.

    NVLS needs multicast memory that virtual machines and containers often cannot make; graph
    registration hangs replays of captured calls on pooled memory; the RAS thread opens a port.
    The caller puts them in its environment: this module never does.
    """
    wanted = {"NCCL_NVLS_ENABLE": "0", "NCCL_GRAPH_REGISTER": "0", "NCCL_RAS_ENABLE": "0"}
    return {name: value for name, value in wanted.items() if name not in existing}


def _candidates(path: str | None) -> Iterator[tuple[str, int]]:
    if path is not None:
        yield path, ctypes.DEFAULT_MODE
        return
    yield _SONAME, ctypes.DEFAULT_MODE | os.RTLD_NOLOAD | os.RTLD_NOW
    spec = importlib.util.find_spec("nvidia.nccl") if importlib.util.find_spec("nvidia") else None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield str(Path(folder) / "lib" / _SONAME), ctypes.DEFAULT_MODE
    yield _SONAME, ctypes.DEFAULT_MODE


class _DlInfo(ctypes.Structure):
    """`Dl_info` of dladdr(3)."""

    _fields_ = [
        ("dli_fname", c_char_p),
        ("dli_fbase", c_void_p),
        ("dli_sname", c_char_p),
        ("dli_saddr", c_void_p),
    ]


def _file_of(function: Any) -> str:
    """The file a C function was loaded from."""
    located = _DlInfo()
    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = [c_void_p, POINTER(_DlInfo)]
    if not dladdr(ctypes.cast(function, c_void_p), ctypes.byref(located)):
        return "unknown"
    return os.fsdecode(located.dli_fname)
