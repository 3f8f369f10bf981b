"""The engine process: frontends on one side, ranks on the other, one event loop between them."""

import asyncio
import logging
import signal
from contextlib import suppress
from pathlib import Path

from coordinator.config import CoordinatorConfig
from coordinator.constraints import Constraints
from coordinator.errors import CoordinatorError, FrontendLost, StartRefused
from coordinator.frontend_link import FrontendProcess, StartFrontend, start_frontend
from coordinator.grammar.pool import GrammarPool
from coordinator.group_leader import GroupLeader
from coordinator.group_status import GroupStatus
from coordinator.metrics import EngineMetrics
from coordinator.model_config import ModelConfig
from coordinator.outbox import Outbox
from coordinator.request_book import RequestBook
from coordinator.step_log import StepLog
from coordinator.tasks import run_until_first_ends
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.notify import Notifier
from lockstep.daemon.ready_file import write_ready_file
from protos.lockstep.v1 import engine_pb2, grammar_pb2

_LOG = logging.getLogger(__name__)
_STATE_PERIOD_S = 0.5
_LISTEN_TIMEOUT_S = 120.0
_DRAIN_MARGIN_S = 5.0


class _Interrupted(CoordinatorError):
    """A second signal came."""


class Engine:
    """Everything of the coordinator but the public API. Runs once."""

    def __init__(
        self,
        config: CoordinatorConfig,
        model: ModelConfig,
        model_digest: str,
        metrics: EngineMetrics,
        metrics_port: int,
        start_frontend: StartFrontend = start_frontend,
        notifier: Notifier | None = None,
        step_log: StepLog | None = None,
    ) -> None:
        self._config = config
        self._start_process = start_frontend
        self._metrics = metrics
        self._metrics_port = metrics_port
        self._notifier = notifier or Notifier({})
        self._outbox = Outbox()
        self._grammars = GrammarPool(config.model, config.grammar_processes, self._take_mask)
        self._book = RequestBook(
            self._outbox, metrics, config.queue_limits, Constraints(self._grammars)
        )
        self._frontends: list[FrontendProcess] = []
        self._ports: dict[int, int] = {}
        self._all_listen = asyncio.Event()
        self._first_listens = asyncio.Event()
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self._status = GroupStatus(config, metrics, self._tell_state)
        self._leader = GroupLeader(
            config, model, model_digest, self._book, self._status, metrics, self._flush, step_log
        )
        self._is_draining = False

    async def run(self) -> int:
        """Serves until drained or broken; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        try:
            await run_until_first_ends(
                self._serve_frontends(),
                self._leader.run(),
                self._announce(),
                self._tell_state_regularly(),
                self._obey_signals(),
                self._notifier.run(lambda: self._status.summary, self._status.stalled_s),
            )
            _LOG.info("drained")
            return ExitCode.CLEAN
        except StartRefused as error:
            _LOG.error("%s", error)
            return error.exit_code
        except FrontendLost as error:
            _LOG.error("%s", error)
            return error.return_code if error.return_code > 0 else 1
        except _Interrupted:
            return ExitCode.SECOND_SIGNAL
        finally:
            await self._close()

    async def _serve_frontends(self) -> None:
        """Starts the frontends and returns when all have ended as they were told to.

        The first one finds the port; the others share it.
        """
        first = await self._start_frontend(0, self._config.port)
        runs = {asyncio.create_task(first.run())}
        listening = asyncio.create_task(self._first_listens.wait())
        try:
            await asyncio.wait(
                {*runs, listening},
                timeout=_LISTEN_TIMEOUT_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not listening.done() and not any(run.done() for run in runs):
                raise StartRefused(
                    ExitCode.ADDRESS, f"the frontend does not serve after {_LISTEN_TIMEOUT_S:g} s"
                )
            if listening.done():
                for index in range(1, self._config.num_frontends):
                    frontend = await self._start_frontend(index, self._ports[0])
                    runs.add(asyncio.create_task(frontend.run()))
            ended, _ = await asyncio.wait(runs, return_when=asyncio.FIRST_EXCEPTION)
            for run in ended:
                run.result()
        finally:
            for task in (*runs, listening):
                task.cancel()
            await asyncio.wait({*runs, listening})

    async def _start_frontend(self, index: int, port: int) -> FrontendProcess:
        frontend = await self._start_process(index, self._config, port, self._take_message)
        self._frontends.append(frontend)
        frontend.link.send(self._status.message())
        return frontend

    async def _announce(self) -> None:
        """Says so, and writes the ready file, once requests can be answered at the public port."""
        await self._all_listen.wait()
        await self._leader.is_up.wait()
        address = f"{self._config.host}:{self._ports[0]}"
        _LOG.info("serving %s on %s", self._config.served_model_name, address)
        if self._config.ready_file:
            write_ready_file(
                Path(self._config.ready_file),
                role="coordinator",
                rank=None,
                grpc=address,
                metrics=f"{self._config.metrics_host}:{self._metrics_port}",
            )
        self._notifier.ready()
        await asyncio.Event().wait()

    async def _tell_state_regularly(self) -> None:
        """The frontends' sign of life: whoever stops this loop is noticed by its silence."""
        while True:
            self._tell_state()
            await asyncio.sleep(_STATE_PERIOD_S)

    async def _obey_signals(self) -> None:
        """First signal: drain. Second: stop at once."""
        number = await self._signals.get()
        pause_s, budget_s = self._config.withdrawal_seconds, self._config.drain_seconds
        words = "%s: draining for at most %g s, after %g s in which requests are still taken"
        _LOG.info(words, number.name, budget_s, pause_s)
        self._is_draining = True
        self._notifier.stopping()
        for frontend in self._frontends:
            frontend.drain(pause_s, budget_s)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s + budget_s + _DRAIN_MARGIN_S):
                number = await self._signals.get()
                _LOG.warning("%s again: stopping at once", number.name)
                raise _Interrupted(number.name)
        _LOG.warning("frontends have not ended in time")

    def _take_message(self, index: int, message: engine_pb2.FrontendMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "submit":
            self._book.submit(index, message.submit)
        elif kind == "release":
            self._book.release(index, message.release)
        elif kind == "abort":
            self._book.abort(index, message.abort)
        elif kind == "alive":
            self._book.alive(index, message.alive.stream_count)
            return
        elif kind == "rejected":
            self._metrics.requests_rejected[message.rejected.reason] += message.rejected.count
            return
        elif kind == "listening":
            self._ports[index] = message.listening.port
            self._first_listens.set()
            if len(self._ports) == self._config.num_frontends:
                self._all_listen.set()
            return
        self._leader.wake()

    def _take_mask(self, reply: grammar_pb2.GrammarReply) -> None:
        self._book.take_mask(reply)
        self._leader.wake()

    def _flush(self) -> None:
        for index, messages in self._outbox.take().items():
            self._frontends[index].link.send(*messages)

    def _tell_state(self) -> None:
        message = self._status.message()
        for frontend in self._frontends:
            frontend.link.send(message)

    async def _close(self) -> None:
        if self._config.ready_file:
            Path(self._config.ready_file).unlink(missing_ok=True)
        await self._leader.close(tell_workers=self._is_draining)
        await self._grammars.stop()
        for frontend in self._frontends:
            await frontend.kill()
