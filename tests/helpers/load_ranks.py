"""One rank of a model, loaded on the CPU as the worker loads it."""

from __future__ import annotations

from pathlib import Path

import torch

from tpcomm import Communicator
from worker.cpu_packing import can_pack
from worker.models.spec import load_model_spec
from worker.models.transformer import Transformer
from worker.ops import cpu_ops
from worker.sharding import make_shard_spec
from worker.weights import load_weights


def load_rank(
    model_dir: Path, comm: Communicator, dtype: torch.dtype = torch.float32
) -> Transformer:
    """This rank's part, weights packed where the processor has kernels for that."""
    spec = load_model_spec(model_dir)
    shard = make_shard_spec(spec, comm.rank, comm.world_size)
    cpu = torch.device("cpu")
    weights, _ = load_weights(
        model_dir,
        spec,
        shard,
        dtype=dtype,
        device=cpu,
        load_format="safetensors",
        progress=lambda done, total: None,
        pack=can_pack(dtype, cpu),
    )
    return Transformer(spec, shard, weights, comm, cpu_ops(), max_position=64)
