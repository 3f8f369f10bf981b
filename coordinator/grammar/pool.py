"""The grammar processes: started when first needed, replaced when lost."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from coordinator.grammar.process import GrammarProcess, grammar_command
from protos.lockstep.v1 import generate_pb2, grammar_pb2

_LOG = logging.getLogger(__name__)
_START_LIMIT_S = 60.0
_ANSWER_LIMIT_S = 5.0
_INVALID_ARGUMENT = 3
_UNAVAILABLE = 14


@dataclass
class _Output:
    params: generate_pb2.SamplingParams
    token_ids: list[int]
    process: GrammarProcess
    is_awaited: bool = field(default=True)  # somebody waits for its next mask


class GrammarPool:
    """Compiles constraints and answers every `open` and `advance` by one call of `take_reply`.

    A process that is brought down, or kept busy too long, by one constraint ends that one alone,
    with whatever begins with the same definition: the others go on in a new process from the
    outputs they have. Owned by the event loop.
    """

    def __init__(
        self,
        model: Path,
        num_processes: int,
        take_reply: Callable[[grammar_pb2.GrammarReply], None],
        start_limit_s: float = _START_LIMIT_S,
        answer_limit_s: float = _ANSWER_LIMIT_S,
        command: Callable[[Path, int, int], Sequence[str]] = grammar_command,
    ) -> None:
        self._model = model
        self._num_processes = num_processes
        self._forward = take_reply
        self._limits_s = (start_limit_s, answer_limit_s)
        self._command = command
        self._processes: list[GrammarProcess] = []
        self._outputs: dict[int, _Output] = {}
        self._vocab_size = 0

    def open(
        self,
        key: int,
        params: generate_pb2.SamplingParams,
        output_ids: Sequence[int],
        vocab_size: int,
    ) -> None:
        """A constrained output begins, or goes on after `output_ids`. `key` is never used again."""
        self._vocab_size = vocab_size
        process = self._idlest()
        self._outputs[key] = _Output(params, list(output_ids), process)
        self._send_open(key)

    def advance(self, key: int, token_id: int) -> None:
        """A token of an output is known."""
        output = self._outputs.get(key)
        if output is None:
            return  # its end is on its way to the request
        output.token_ids.append(token_id)
        output.is_awaited = True
        request = grammar_pb2.AdvanceGrammar(key=key, token_id=token_id)
        output.process.send(grammar_pb2.GrammarRequest(advance=request), key)

    def close(self, key: int) -> None:
        """Forgets an output; unknown keys have been forgotten before."""
        output = self._outputs.pop(key, None)
        if output is not None:
            request = grammar_pb2.CloseGrammar(key=key)
            output.process.send(grammar_pb2.GrammarRequest(close=request), 0)

    async def stop(self) -> None:
        """Ends every process."""
        processes, self._processes = self._processes, []
        for process in processes:
            await process.stop()

    def _idlest(self) -> GrammarProcess:
        if len(self._processes) < self._num_processes:
            self._processes.append(
                GrammarProcess(
                    functools.partial(self._command, self._model, self._vocab_size),
                    self._take_reply,
                    self._take_loss,
                    *self._limits_s,
                )
            )
            return self._processes[-1]
        return min(self._processes, key=lambda process: process.num_unanswered)

    def _send_open(self, key: int) -> None:
        output = self._outputs[key]
        request = grammar_pb2.OpenGrammar(
            key=key,
            params=output.params,
            output_ids=np.array(output.token_ids, "<i4").tobytes(),
        )
        output.process.send(grammar_pb2.GrammarRequest(open=request), key)

    def _take_reply(self, reply: grammar_pb2.GrammarReply) -> None:
        output = self._outputs.get(reply.key)
        if output is None:
            return  # closed meanwhile
        if reply.status_code:
            del self._outputs[reply.key]
        elif not output.is_awaited:
            return  # opened again in a new process while its token is being sampled
        output.is_awaited = False
        self._forward(reply)

    def _take_loss(self, process: GrammarProcess, blamed: int, problem: str) -> None:
        _LOG.warning("a grammar process %s", problem)
        self._processes.remove(process)
        hit = [key for key, output in self._outputs.items() if output.process is process]
        bad = self._alike(blamed)
        for key in hit:
            if not process.is_up:
                self._end(key, _UNAVAILABLE, f"the grammar process {problem}")
            elif key in bad:
                self._end(key, _INVALID_ARGUMENT, f"the grammar process {problem} for this one")
            else:
                self._outputs[key].process = self._idlest()
                self._send_open(key)

    def _alike(self, blamed: int) -> set[int]:
        """With whatever else begins with the same definition, as the samples of its call do: each
        would cost a process more. What has got further goes on."""
        output = self._outputs.get(blamed)
        if output is None or output.token_ids:
            return {blamed}
        return {
            key
            for key, other in self._outputs.items()
            if not other.token_ids and other.params == output.params
        }

    def _end(self, key: int, status: int, problem: str) -> None:
        del self._outputs[key]
        self._forward(
            grammar_pb2.GrammarReply(
                key=key, status_code=status, status_message=f"constraint: {problem}"
            )
        )
