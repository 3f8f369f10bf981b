"""`lockstep chat`: a conversation in the terminal, or over a pipe with a question a line.

Ctrl-C ends an answer; at the prompt, twice in a row, the chat. /help lists the commands.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence

from lockstep.client import CallFailed, Client, ConfigError, GenerateRequest, SamplingParams
from lockstep.connection_flags import add_connection_flags, client_config
from lockstep.conversation import Conversation
from lockstep.daemon.exit_codes import ExitCode
from lockstep.generate import stream_text
from lockstep.sampling_flags import (
    add_request_flags,
    add_sampling_flags,
    request_fields,
    sampling_params,
)

_INTERRUPTED = 130
_HELP = """\
/reset         forget the conversation, keep the system message
/system TEXT   set the system message and begin anew; without TEXT: no system message
/help          this list
/quit          end the chat, as Ctrl-D does
Ctrl-C ends an answer."""


def main(argv: Sequence[str]) -> int:
    """Talks until the input ends; returns 0, or without a terminal 1 when a call failed.

    2: bad settings; 130: interrupted.
    """
    options = _parser().parse_args(argv)
    is_terminal = sys.stdin.isatty()
    try:
        client = Client(options.address, client_config(options, os.environ))
    except ConfigError as error:
        print(f"lockstep chat: {error}", file=sys.stderr)
        return ExitCode.CONFIG
    with client:
        talk = _Talk(client, options, is_terminal)
        return talk.run()


class _Talk:
    """The loop of questions and answers."""

    def __init__(self, client: Client, options: argparse.Namespace, is_terminal: bool) -> None:
        self._client = client
        self._conversation = Conversation(options.system)
        self._params = SamplingParams(**sampling_params(options))
        self._fields = request_fields(options)
        self._is_terminal = is_terminal
        self._shows_speed = is_terminal or options.verbose

    def run(self) -> int:
        """Returns the exit code."""
        if self._is_terminal and importlib.util.find_spec("readline"):
            importlib.import_module("readline")  # gives input() editing and a history
        num_interrupts = 0
        while True:
            try:
                line = input("> " if self._is_terminal else "").strip()
            except EOFError:
                self._say("")
                return ExitCode.CLEAN
            except KeyboardInterrupt:
                num_interrupts += 1
                if num_interrupts > 1 or not self._is_terminal:
                    self._say("\n(ended)")
                    return _INTERRUPTED
                self._say("\n(Ctrl-C again, Ctrl-D or /quit ends the chat)")
                continue
            num_interrupts = 0
            if line == "/quit":
                return ExitCode.CLEAN
            code = self._command(line) if line.startswith("/") else self._answer(line)
            if code and not self._is_terminal:
                return code

    def _command(self, line: str) -> int:
        word, _, text = line.partition(" ")
        match word:
            case "/reset":
                self._conversation.reset()
                self._say("(the conversation is forgotten)")
            case "/system":
                self._conversation.reset(system=text.strip())
                self._say("(a new conversation)")
            case "/help":
                self._say(_HELP)
            case _:
                print(f"no command {word!r}\n{_HELP}", file=sys.stderr)
                return ExitCode.CONFIG
        return ExitCode.CLEAN

    def _answer(self, question: str) -> int:
        """Asks and prints. A question without its whole answer leaves no trace."""
        if not question:
            return ExitCode.CLEAN
        request = GenerateRequest(self._conversation.asked(question), self._params, **self._fields)
        began = time.monotonic()
        with self._client.generate(request) as generation:
            try:
                answer = stream_text(generation)
            except CallFailed as error:
                begun = "\n" if generation.started is not None else ""
                print(f"{begun}lockstep chat: {error}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                print(flush=True)
                return _INTERRUPTED
        self._conversation.add(question, answer)
        if self._shows_speed and generation.finished is not None:
            num_tokens = generation.finished.usage.output_token_count
            print(_speed(num_tokens, time.monotonic() - began), file=sys.stderr, flush=True)
        return ExitCode.CLEAN

    def _say(self, line: str) -> None:
        """For people: nothing of it belongs to the answers that a pipe collects."""
        if self._is_terminal:
            print(line, flush=True)


def _speed(num_tokens: int, seconds: float) -> str:
    return f"({num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.1f} tokens/s)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep chat", description=__doc__)
    parser.add_argument("--system", metavar="TEXT", default="", help="system message")
    text = "say how many tokens a second came, also without a terminal"
    parser.add_argument("--verbose", action="store_true", help=text)
    add_sampling_flags(parser)
    add_request_flags(parser)
    add_connection_flags(parser)
    return parser
