"""Memory that grows behind a captured graph."""

from __future__ import annotations

import pytest
import torch

from tpcomm import CudaDriverError
from tpcomm.cuda_vmm import VirtualRange

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 1 GPU"),
]
MIB = 1 << 20


def test_graph_reads_memory_that_was_mapped_after_its_capture() -> None:
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    memory = VirtualRange(64 * MIB, device)
    memory.map_more(2 * MIB)
    rows = memory.as_tensor((64, MIB // 4), torch.float32)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    out = torch.zeros(1, MIB // 4, device=device)
    rows[0].fill_(1.0)
    torch.index_select(rows, 0, index, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.index_select(rows, 0, index, out=out)
    memory.map_more(62 * MIB)
    assert memory.mapped_bytes == memory.reserve_bytes
    rows[63].fill_(7.0)
    index.fill_(63)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((out == 7.0).all())
    del graph
    memory.close()


def test_more_than_the_device_has_is_an_error_and_the_range_stays_usable() -> None:
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    total = torch.cuda.get_device_properties(device).total_memory
    memory = VirtualRange(2 * total, device)
    with pytest.raises(CudaDriverError, match="cuMemCreate returned 2"):
        memory.map_more(2 * total)
    memory.map_more(MIB)
    tensor = memory.as_tensor((10,), torch.bfloat16)
    tensor.fill_(3.0)
    assert float(tensor.sum()) == 30.0
    memory.close()
