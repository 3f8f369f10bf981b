"""A rank without a model, as worker/rank_contract.py wants one."""

from __future__ import annotations

from collections.abc import Mapping

from protos.lockstep.v1 import worker_pb2
from worker.errors import PhaseError
from worker.simulated.config import SimulatedConfig
from worker.simulated.executor import SimulatedExecutor
from worker.simulated.slots import SimulatedSlots
from worker.simulated.timing import SimulatedDevice, SimulationAborted, StepCost
from worker.simulated.tokens import TokenChooser
from worker.simulated.vocabulary import choose_vocabulary, config_vocab_size
from worker.tables import TableLimits


class SimulatedRank:
    """Start-up phases that agree to everything; all methods but `abort` on the device thread.

    Raises UnsupportedModel or CheckpointError when made, as reading a real model does.
    """

    foreseen_errors = (SimulationAborted,)

    def __init__(self, config: SimulatedConfig) -> None:
        self.phase = worker_pb2.WORKER_PHASE_STARTED
        self.rank = 0
        self.world_size = 1
        self.executor: SimulatedExecutor | None = None
        self.memory_bytes: Mapping[str, int] = {}
        self.vocab_size = config.vocab_size or config_vocab_size(config.model)
        self._config = config
        vocabulary = choose_vocabulary(config.model, config.token_text, self.vocab_size)
        self._chooser = TokenChooser(vocabulary, config.stop_probability)
        self._engine_config: worker_pb2.EngineConfig | None = None
        self._device = SimulatedDevice()

    @property
    def is_joined(self) -> bool:
        """Whether an epoch is to be left."""
        return self.phase not in (
            worker_pb2.WORKER_PHASE_STARTED,
            worker_pb2.WORKER_PHASE_LOADED,
        )

    def device_identity(self) -> tuple[str, str]:
        """No GPU, so that the coordinator asks for none."""
        return "simulated", ""

    def enter_thread(self) -> None:
        """Nothing to prepare."""

    def load(self, config: worker_pb2.EngineConfig) -> worker_pb2.LoadResponse:
        """Takes the settings; there are no weights."""
        self._engine_config = config
        self.phase = worker_pb2.WORKER_PHASE_LOADED
        return worker_pb2.LoadResponse(vocab_size=self.vocab_size)

    def create_group_id(self, host: str) -> bytes:
        """Stands for no group."""
        return b"simulated"

    def join(self, group_id: bytes, timeout_s: float) -> float:
        """Ranks never meet."""
        self._need_engine_config()
        self.phase = worker_pb2.WORKER_PHASE_JOINED
        return 0.0

    def preflight(self, timeout_s: float) -> worker_pb2.PreflightResponse:
        """No paths, as there are no collectives."""
        return worker_pb2.PreflightResponse()

    def capture(self) -> worker_pb2.CaptureResponse:
        """`--num-blocks` alone says what fits."""
        self._need_engine_config()
        self.phase = worker_pb2.WORKER_PHASE_CAPTURED
        return worker_pb2.CaptureResponse(max_block_count=self._config.num_blocks)

    def init_kv_cache(self, num_blocks: int, epoch: int) -> int:
        """Commands may come now. The cache takes no memory."""
        engine = self._need_engine_config()
        limits = TableLimits(
            max_num_seqs=engine.max_num_seqs,
            max_batch_tokens=engine.max_batch_tokens,
            max_blocks_per_seq=-(-engine.max_model_len // engine.block_size),
            max_model_len=engine.max_model_len,
            block_size=engine.block_size,
            num_blocks=num_blocks,
            vocab_size=self.vocab_size,
        )
        self._device = SimulatedDevice()
        slots = None
        if self.rank == 0:
            num_slots = engine.max_num_seqs + 1
            slots = SimulatedSlots(num_slots, self.vocab_size, self._chooser, self._config.seed)
        self.executor = SimulatedExecutor(
            epoch,
            limits,
            slots,
            self._cost(),
            self._device,
            tells_time=self._config.token_text == "clock",
        )
        self.phase = worker_pb2.WORKER_PHASE_READY
        return 0

    def reset(self) -> None:
        """Leaves the epoch."""
        self.executor = None
        self.phase = worker_pb2.WORKER_PHASE_LOADED

    def recorded(self) -> worker_pb2.DumpFlightRecorderResponse:
        """Nothing: no tensor is carried."""
        return worker_pb2.DumpFlightRecorderResponse()

    def abort(self) -> None:
        """Wakes a step that sleeps. Any thread."""
        self._device.abort()

    def _cost(self) -> StepCost:
        config = self._config
        return StepCost(
            step_s=config.step_ms / 1e3,
            row_s=config.row_us / 1e6,
            prefill_s=config.prefill_us / 1e6,
            jitter=config.jitter,
            seed=config.seed,
        )

    def _need_engine_config(self) -> worker_pb2.EngineConfig:
        if self._engine_config is None:
            raise PhaseError("the settings are not here; call Load first")
        return self._engine_config
