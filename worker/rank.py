"""One rank's start-up, phase by phase: weights, group, graphs, KV cache.

Each phase may be entered again: a new epoch keeps weights that were loaded with the same settings.
All methods but `abort` and `recorded` run on the device thread.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

import tpcomm
from lockstep.daemon.cache_dir import cache_dir
from protos.lockstep.v1 import worker_pb2
from worker.config import WorkerConfig
from worker.cpu_packing import can_pack
from worker.device import device_identity, select_device
from worker.device_memory import DeviceMemory
from worker.device_tables import DeviceTables
from worker.errors import PhaseError
from worker.executor import StepExecutor
from worker.kv_cache import KvCache, KvLayout, fitting_blocks, kv_layout
from worker.linear_choice import choose_linears
from worker.load_progress import LoadProgress
from worker.model_runner import ModelRunner
from worker.models.spec import ModelSpec
from worker.models.transformer import Transformer
from worker.ops import Ops, cpu_ops, cuda_ops
from worker.path_message import preflight_response
from worker.record_message import recorded_message
from worker.sampling.tables import SlotSampling
from worker.sharding import ShardSpec, make_shard_spec
from worker.step_graphs import StepGraphs
from worker.tables import TableLimits
from worker.warm_up import warm_up
from worker.weight_layout import TransformerWeights
from worker.weights import LoadReport, load_weights

_LOG = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU_PROBE_BLOCKS = 2


@dataclass(frozen=True)
class LoadedModel:
    """What outlives an epoch."""

    config: worker_pb2.EngineConfig
    shard: ShardSpec
    weights: TransformerWeights
    report: LoadReport
    ops: Ops


class Rank:
    """The state of one rank, as worker/rank_contract.py says. `phase` tells how far it is."""

    foreseen_errors = (tpcomm.CommError,)

    def __init__(self, config: WorkerConfig, spec: ModelSpec) -> None:
        self.spec = spec
        self.device = torch.device(config.device)
        self.memory = DeviceMemory(self.device)
        self.phase = worker_pb2.WORKER_PHASE_STARTED
        self.rank = 0
        self.world_size = 1
        self.comm: tpcomm.Communicator | None = None
        self.executor: StepExecutor | None = None
        self._config = config
        self.loaded: LoadedModel | None = None
        self._runner: ModelRunner | None = None
        self._graphs: StepGraphs | None = None

    @property
    def is_joined(self) -> bool:
        """Whether this rank is in a group."""
        return self.comm is not None

    @property
    def memory_bytes(self) -> Mapping[str, int]:
        """The memory ledger, by kind."""
        return self.memory.by_kind

    def device_identity(self) -> tuple[str, str]:
        """(name, UUID) of the device; ("cpu", "") on CPU."""
        return device_identity(self.device)

    def enter_thread(self) -> None:
        """Selects the device, which CUDA wants of each thread."""
        select_device(self.device)

    def load(self, config: worker_pb2.EngineConfig) -> worker_pb2.LoadResponse:
        """Loads this rank's shard, or keeps it when nothing about it has changed."""
        shard = make_shard_spec(self.spec, self.rank, self.world_size)
        loaded = self.loaded
        progress = LoadProgress(self.rank)
        if loaded is None or loaded.config != config or loaded.shard != shard:
            self.loaded = None  # frees the old weights before the new ones are allocated
            with self.memory.counted("weights"):
                weights, report = load_weights(
                    self._config.model,
                    self.spec,
                    shard,
                    dtype=_DTYPES[config.dtype],
                    device=self.device,
                    load_format="dummy" if config.load_format == "dummy" else "safetensors",
                    progress=progress.update,
                    pack=can_pack(_DTYPES[config.dtype], self.device),
                )
            if self.device.type == "cpu":
                self.memory.by_kind["weights"] = (
                    report.num_parameters * _DTYPES[config.dtype].itemsize
                )
            self.loaded = loaded = LoadedModel(config, shard, weights, report, self._ops(weights))
            progress.finish(report)
        else:
            progress.finish(None)
        self.phase = worker_pb2.WORKER_PHASE_LOADED
        return worker_pb2.LoadResponse(
            local_q_head_count=shard.num_local_q_heads,
            local_kv_head_count=shard.num_local_kv_heads,
            parameter_count=loaded.report.num_parameters,
            bytes_read=loaded.report.bytes_read,
            seconds=loaded.report.seconds,
            block_bytes=self.kv_layout().block_bytes,
            vocab_size=self.spec.vocab_size,
        )

    def create_group_id(self, host: str) -> bytes:
        """The communicator id, made in this process, which the others will dial, gloo at `host`."""
        config = self._need_loaded().config
        return tpcomm.create_group_id(
            config.comm, host=host, nccl_path=self._config.nccl_path or None
        )

    def join(self, group_id: bytes, timeout_s: float) -> float:
        """Becomes part of the group; returns the seconds it took. Collective."""
        loaded = self._need_loaded()
        started = time.monotonic()
        with self.memory.counted("comm"):
            self.comm = tpcomm.create_communicator(
                loaded.config.comm,
                group_id,
                self.rank,
                self.world_size,
                self.device,
                timeout_s,
                nccl_path=self._config.nccl_path or None,
            )
        self.phase = worker_pb2.WORKER_PHASE_JOINED
        return time.monotonic() - started

    def preflight(self, timeout_s: float) -> worker_pb2.PreflightResponse:
        """Checks and times every communication path. Collective."""
        comm, dtype = self._need_comm(), _DTYPES[self._need_loaded().config.dtype]
        reports = tpcomm.preflight(comm, timeout_s, self.spec.hidden_size, dtype)
        return preflight_response(comm, reports)

    def capture(self) -> worker_pb2.CaptureResponse:
        """Builds tables, warms up, captures graphs and says what KV cache fits. Collective."""
        loaded, comm = self._need_loaded(), self._need_comm()
        config = loaded.config
        started = time.monotonic()
        layout = self.kv_layout()
        kv_cache = KvCache(layout, self.device, self._most_blocks(layout, config))
        kv_cache.grow(1 if self.device.type == "cuda" else _CPU_PROBE_BLOCKS)
        with self.memory.counted("tables"):
            runner = self._make_runner(loaded, comm, kv_cache)
        self._runner = runner
        with self.memory.counted("workspace"):
            warm_up(runner, config)
        if self.device.type == "cuda" and config.use_graphs:
            with self.memory.counted("graphs"):
                self._graphs = StepGraphs(runner, config)
                self._graphs.capture()
        self.phase = worker_pb2.WORKER_PHASE_CAPTURED
        return worker_pb2.CaptureResponse(
            padded_sizes=self._graphs.decode.sizes if self._graphs else [],
            seconds=time.monotonic() - started,
            max_block_count=self._fitting_blocks(layout, config),
            memory_bytes=self.memory.by_kind,
        )

    def init_kv_cache(self, num_blocks: int, epoch: int) -> int:
        """Takes the agreed number of blocks; returns their bytes. Commands may come now."""
        runner, config = self._need_runner(), self._need_loaded().config
        runner.kv_cache.grow(num_blocks)
        self.memory.by_kind["kv"] = runner.kv_cache.num_bytes
        limits = TableLimits(
            max_num_seqs=config.max_num_seqs,
            max_batch_tokens=config.max_batch_tokens,
            max_blocks_per_seq=_blocks_per_seq(config),
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            num_blocks=num_blocks,
            vocab_size=self.spec.vocab_size,
        )
        self.executor = StepExecutor(epoch, limits, runner, self._graphs)
        self.phase = worker_pb2.WORKER_PHASE_READY
        return runner.kv_cache.num_bytes

    def reset(self) -> None:
        """Leaves the epoch: drops group, graphs and KV cache, keeps the weights."""
        self.executor = None
        self._graphs = None
        if self._runner is not None:
            self._runner.kv_cache.close()
            self._runner = None
        if self.comm is not None:
            self.comm.close()
            self.comm = None
        self.phase = (
            worker_pb2.WORKER_PHASE_LOADED if self.loaded else worker_pb2.WORKER_PHASE_STARTED
        )

    def recorded(self) -> worker_pb2.DumpFlightRecorderResponse:
        """The last collectives of this rank's group, and totals. Any thread.

        Raises CommTimeout if the device does not answer.
        """
        comm = self.comm
        return recorded_message(tpcomm.Recorded() if comm is None else comm.recorded())

    def abort(self) -> None:
        """Frees a device thread that hangs in a collective. Any thread; never blocks."""
        if self.comm is not None:
            self.comm.abort()

    def kv_layout(self) -> KvLayout:
        """Sizes of this rank's KV blocks."""
        loaded = self._need_loaded()
        dtype = _DTYPES[loaded.config.dtype]
        return kv_layout(self.spec, loaded.shard, loaded.config.block_size, dtype)

    def _ops(self, weights: TransformerWeights) -> Ops:
        """The device's operations; on CUDA each product by the kernel that is fastest here."""
        if self.device.type == "cpu":
            return cpu_ops()
        linears = choose_linears(weights, cache_dir(os.environ))
        return replace(cuda_ops(), linear=linears.linear, gated_linear=linears.gated_linear)

    def _make_runner(
        self, loaded: LoadedModel, comm: tpcomm.Communicator, kv_cache: KvCache
    ) -> ModelRunner:
        config, shard, ops = loaded.config, loaded.shard, loaded.ops
        return ModelRunner(
            model=Transformer(
                self.spec, shard, loaded.weights, comm, ops, max_position=config.max_model_len
            ),
            kv_cache=kv_cache,
            tables=DeviceTables(
                config.max_num_seqs, _blocks_per_seq(config), config.block_size, self.device
            ),
            sampling=SlotSampling(
                config.max_num_seqs + 1, shard.padded_vocab, shard.vocab_start, self.device
            ),
            comm=comm,
            ops=ops,
        )

    def _most_blocks(self, layout: KvLayout, config: worker_pb2.EngineConfig) -> int:
        """Blocks worth of addresses to reserve: what the whole device could hold."""
        useful = config.max_num_seqs * _blocks_per_seq(config) + 1
        return max(2, min(useful, self.memory.total_bytes // layout.block_bytes))

    def _fitting_blocks(self, layout: KvLayout, config: worker_pb2.EngineConfig) -> int:
        most = self._most_blocks(layout, config)
        if config.kv_cache_bytes:
            return min(most, fitting_blocks(config.kv_cache_bytes, 0, layout))
        free, reserve = self.memory.kv_budget(config.gpu_memory_fraction, self.world_size)
        return min(most, fitting_blocks(free, reserve, layout))

    def _need_loaded(self) -> LoadedModel:
        if self.loaded is None:
            raise PhaseError("the weights are not loaded; call Load first")
        return self.loaded

    def _need_comm(self) -> tpcomm.Communicator:
        if self.comm is None:
            raise PhaseError("this rank is in no group; call Join first")
        return self.comm

    def _need_runner(self) -> ModelRunner:
        if self._runner is None:
            raise PhaseError("nothing is captured; call Capture first")
        return self._runner


def _blocks_per_seq(config: worker_pb2.EngineConfig) -> int:
    return -(-config.max_model_len // config.block_size)
