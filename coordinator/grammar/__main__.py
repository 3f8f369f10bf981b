"""`python -m coordinator.grammar`: started by the engine, never by hand."""

import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from llguidance import LLTokenizer

from coordinator.frames import framed
from coordinator.frontend.generation_defaults import load_generation_defaults
from coordinator.grammar.matchers import Matchers
from lockstep.daemon.parent_death import die_with_parent
from protos.lockstep.v1 import grammar_pb2

_LENGTH_BYTES = 4
_MAX_DATA_BYTES = 4 << 30
_FAILED_PRECONDITION = 9
_Answer = Callable[[grammar_pb2.GrammarRequest], grammar_pb2.GrammarReply | None]


def main(argv: list[str]) -> int:
    """Answers until the engine closes the socket. `argv`: fd, engine pid, model, vocab_size."""
    engine_fd, engine_pid, model, vocab_size = argv
    # As for frontends: only the engine stops us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(int(engine_pid))
    # A definition that would take more ends its process, not the host.
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_DATA_BYTES, most))
    engine = socket.socket(fileno=int(engine_fd))
    engine.setblocking(True)
    answer = _matchers(Path(model), int(vocab_size))
    with engine, engine.makefile("rb") as requests:
        _send(engine, grammar_pb2.GrammarReply())  # the tokenizer is read
        while header := requests.read(_LENGTH_BYTES):
            payload = requests.read(int.from_bytes(header, "little"))
            reply = answer(grammar_pb2.GrammarRequest.FromString(payload))
            if reply is not None:
                _send(engine, reply)
    return 0


def _matchers(model: Path, vocab_size: int) -> _Answer:
    """What answers; where the checkpoint allows no constraints, something that says so."""
    eos_ids = load_generation_defaults(model, vocab_size).eos_token_ids
    if not eos_ids:
        return _refusal("the checkpoint names no end-of-sequence id, which constraints need")
    file = model / "tokenizer.json"
    try:
        tokenizer = LLTokenizer(str(file), eos_token=list(eos_ids))
    except ValueError as error:
        return _refusal(f"constraints cannot be used with this checkpoint's tokenizer: {error}")
    return Matchers(tokenizer, vocab_size).answer


def _refusal(problem: str) -> _Answer:
    def refuse(request: grammar_pb2.GrammarRequest) -> grammar_pb2.GrammarReply | None:
        if request.WhichOneof("request") != "open":
            return None
        return grammar_pb2.GrammarReply(
            key=request.open.key, status_code=_FAILED_PRECONDITION, status_message=problem
        )

    return refuse


def _send(engine: socket.socket, reply: grammar_pb2.GrammarReply) -> None:
    engine.sendall(framed(reply))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
