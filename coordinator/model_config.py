"""What the engine must know of a checkpoint before a rank has loaded it."""

import json
from dataclasses import dataclass
from pathlib import Path

from coordinator.config import CoordinatorConfig
from coordinator.errors import BadCheckpoint, StartRefused
from lockstep.daemon.exit_codes import ExitCode

# Wider block tables cost device memory on every rank whether or not anybody asks for them.
_LONGEST_DEFAULT = 131072
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelConfig:
    """Facts of config.json. `dtype` is the checkpoint's own, `max_position` its longest context."""

    dtype: str
    max_position: int


def read_model_config(model_dir: Path) -> ModelConfig:
    """Reads config.json; raises BadCheckpoint naming the key."""
    path = model_dir / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadCheckpoint(path, str(error)) from None
    if not isinstance(content, dict):
        raise BadCheckpoint(path, "must hold a JSON object")
    max_position = content.get("max_position_embeddings")
    if not isinstance(max_position, int) or max_position < 2:
        raise BadCheckpoint(path, f"max_position_embeddings is {max_position!r}; want an integer")
    dtype = content.get("dtype") or content.get("torch_dtype") or "float32"
    if not isinstance(dtype, str) or dtype.removeprefix("torch.") not in _DTYPES:
        raise BadCheckpoint(path, f"dtype is {dtype!r}; want one of {', '.join(_DTYPES)}")
    return ModelConfig(dtype.removeprefix("torch."), max_position)


def table_width(config: CoordinatorConfig, model: ModelConfig) -> int:
    """Tokens that a block table must have room for; raises StartRefused."""
    if config.max_model_len > model.max_position:
        raise StartRefused(
            ExitCode.CONFIG,
            f"--max-model-len {config.max_model_len} is above the checkpoint's "
            f"max_position_embeddings {model.max_position}",
        )
    return config.max_model_len or min(model.max_position, _LONGEST_DEFAULT)


def served_max_model_len(config: CoordinatorConfig, model: ModelConfig, num_blocks: int) -> int:
    """Longest prompt + output that fits the context and the cache alone; raises StartRefused.

    `num_blocks` counts the dummy.
    """
    capacity = (num_blocks - 1) * config.block_size
    if config.max_model_len > capacity:
        raise StartRefused(
            ExitCode.CONFIG,
            f"--max-model-len {config.max_model_len} does not fit: the KV cache holds {capacity} "
            f"tokens ({num_blocks - 1} blocks of {config.block_size}); lower it, or give more "
            f"memory by --kv-cache-bytes or --gpu-memory-fraction",
        )
    if capacity < 2:
        raise StartRefused(
            ExitCode.DEVICE,
            f"the KV cache holds {capacity} tokens; give more memory by --kv-cache-bytes or "
            f"--gpu-memory-fraction",
        )
    return min(table_width(config, model), capacity)
