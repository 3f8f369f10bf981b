"""What `VllmEngine` tells of model, server and load, in the words of that protocol."""

import dataclasses
import datetime
import json
from typing import Any

from coordinator.frontend.checkpoint_files import read_json_object
from coordinator.frontend.checkpoint_text import CheckpointText
from coordinator.frontend.generation_defaults import GenerationDefaults
from lockstep.daemon.version import __version__
from protos.lockstep.v1 import generate_pb2
from protos.vllm_engine import vllm_engine_pb2

# Neither a folder nor a name that a model hub knows. Without any a gateway does not ask
# GetTokenizer; a real one it would look up there first.
_NO_PATH = "lockstep:GetTokenizer"


def checkpoint_info(
    text: CheckpointText, served_model_name: str
) -> vllm_engine_pb2.GetModelInfoResponse:
    """GetModelInfo's answer without the limits, which only the group knows."""
    config = read_json_object(text.model_dir / "config.json")
    architectures = config.get("architectures")
    return vllm_engine_pb2.GetModelInfoResponse(
        is_generation=True,
        served_model_name=served_model_name,
        tokenizer_path=_NO_PATH if text.tokenizer is not None else "",
        model_type=str(config.get("model_type", "")),
        architectures=architectures if isinstance(architectures, list) else (),
        eos_token_ids=text.defaults.eos_token_ids,
        pad_token_id=_id_or_0(config, "pad_token_id"),
        bos_token_id=_id_or_0(config, "bos_token_id"),
        default_sampling_params_json=json.dumps(_own_defaults(text.defaults)),
    )


def server_info(
    server: generate_pb2.GetServerInfoResponse, uptime_seconds: float
) -> vllm_engine_pb2.GetServerInfoResponse:
    """GetServerInfo's answer."""
    return vllm_engine_pb2.GetServerInfoResponse(
        active_requests=server.running_count + server.waiting_count,
        uptime_seconds=uptime_seconds,
        server_type="lockstep",
        data_parallel_size=1,
        block_size=server.block_size,
        max_num_seqs=server.max_num_seqs,
    )


def loads(
    server: generate_pb2.GetServerInfoResponse, now: datetime.datetime
) -> vllm_engine_pb2.GetLoadsResponse:
    """GetLoads' answer."""
    num_tokens = server.block_count * server.block_size
    load = vllm_engine_pb2.SchedulerLoad(
        num_running_reqs=server.running_count,
        num_waiting_reqs=server.waiting_count,
        num_total_reqs=server.running_count + server.waiting_count,
        num_used_tokens=round(num_tokens * server.kv_cache_usage),
        max_total_num_tokens=num_tokens,
        token_usage=server.kv_cache_usage,
        utilization=server.running_count / server.max_num_seqs if server.max_num_seqs else 0.0,
        max_running_requests=server.max_num_seqs,
    )
    return vllm_engine_pb2.GetLoadsResponse(
        timestamp=now.isoformat(), version=__version__, dp_rank_count=1, loads=[load]
    )


def _own_defaults(defaults: GenerationDefaults) -> dict[str, float]:
    """The sampling parameters that the checkpoint sets."""
    own = dataclasses.asdict(defaults)
    del own["eos_token_ids"]
    plain = dataclasses.asdict(GenerationDefaults())
    return {name: value for name, value in own.items() if value != plain[name]}


def _id_or_0(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) else 0
