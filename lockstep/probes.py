"""Questions that only heavy imports can answer, asked in processes of their own.

This package may not import torch, tpcomm or worker, and a driver that hangs must not hang the
asker. So each probe is a small program for `python -c` whose last line of output is JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROBE_LIMIT_S = 120.0  # importing torch from a cold disk can take a minute
COMM_LIMIT_S = 120.0  # every path is compiled, checked and timed

TORCH = """
import json, torch
gpus = []
for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    gpu = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    peers = [
        other
        for other in range(torch.cuda.device_count())
        if other != index and torch.cuda.can_device_access_peer(index, other)
    ]
    gpus.append(
        {"name": gpu.name, "capability": [gpu.major, gpu.minor], "total_bytes": total,
         "free_bytes": free, "peers": peers}
    )
try:
    import triton
    triton_version = triton.__version__
except ImportError:
    triton_version = None
print(json.dumps(
    {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus,
     "triton": triton_version, "cpu_capability": torch.backends.cpu.get_cpu_capability()}
))
"""

NCCL = """
import json, sys
try:
    import torch  # brings its own copy, which is the one that workers find
except ImportError:
    pass
from tpcomm.errors import NcclNotFound
from tpcomm.nccl_loader import load_nccl
try:
    library = load_nccl(sys.argv[1] or None)
    print(json.dumps({"version": library.version, "path": library.path}))
except NcclNotFound as error:
    print(json.dumps({"missing": str(error)}))
"""

SHARDS = """
import json, sys
from pathlib import Path
import torch
from worker.errors import UnsupportedModel
from worker.models.spec import load_model_spec
from worker.sharding import make_shard_spec
from worker.weight_layout import allocate_weights

def all_tensors(part):
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, tuple):
        for item in part:
            yield from all_tensors(item)
    elif part is not None:
        yield from all_tensors(tuple(vars(part).values()))

def num_bytes(weights):
    # A tied LM head is the embedding once more.
    distinct = {id(tensor): tensor for tensor in all_tensors(weights)}.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct)

def describe(spec, rank, world_size):
    shard = make_shard_spec(spec, rank, world_size)
    weights = allocate_weights(spec, shard, spec.torch_dtype, torch.device("meta"))
    kv_elements = 2 * spec.num_layers * shard.num_local_kv_heads * spec.head_dim
    return {
        "rank": rank, "q_heads": shard.num_local_q_heads, "kv_heads": shard.num_local_kv_heads,
        "ffn": shard.num_local_ffn, "vocab": shard.num_local_vocab,
        "weight_bytes": num_bytes(weights),
        "kv_bytes_per_token": kv_elements * spec.torch_dtype.itemsize,
    }

try:
    spec = load_model_spec(Path(sys.argv[1]))
    world_size = int(sys.argv[2])
    print(json.dumps({
        "family": spec.family, "dtype": str(spec.torch_dtype).removeprefix("torch."),
        "full_weight_bytes": describe(spec, 0, 1)["weight_bytes"],
        "ranks": [describe(spec, rank, world_size) for rank in range(world_size)],
    }))
except UnsupportedModel as error:
    print(json.dumps({"unsupported": str(error)}))
"""

COMM = """
import sys
from tpcomm.bench.__main__ import main
main(["preflight", "--limit-s", sys.argv[1]])
"""


def run_probe(
    program: str, arguments: Sequence[str] = (), *, limit_s: float = PROBE_LIMIT_S
) -> dict[str, Any]:
    """The JSON object that `program` prints last, or {"failed": one line that says why}."""
    root = str(Path(__file__).parents[1])  # where the sibling packages lie, installed or not
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        finished = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {limit_s:g} s"}
    if finished.returncode != 0:
        return {"failed": _last_line(finished.stderr) or f"exit status {finished.returncode}"}
    try:
        answer = json.loads(_last_line(finished.stdout))
    except json.JSONDecodeError:
        return {"failed": f"printed no JSON but {_last_line(finished.stdout)!r}"}
    return dict(answer)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""
