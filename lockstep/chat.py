"""`lockstep chat`: a conversation in the terminal."""

import argparse
import sys
from collections.abc import Sequence

from lockstep.client import Client, chat_request
from lockstep.connection import Connection, add_connection_flags
from lockstep.daemon.exit_codes import ExitCode
from lockstep.errors import CallFailed, ConfigError
from lockstep.generate import stream_text
from lockstep.sampling_flags import (
    add_request_flags,
    add_sampling_flags,
    sampling_params,
    set_request_fields,
)


def main(argv: Sequence[str]) -> int:
    """Talks until the input ends; returns 0, 1 when a call failed, 2 for wrong flags."""
    options = _parser().parse_args(argv)
    try:
        connection = Connection.of_options(options)
    except ConfigError as error:
        print(f"lockstep chat: {error}", file=sys.stderr)
        return ExitCode.CONFIG
    messages = [{"role": "system", "content": options.system}] if options.system else []
    params = sampling_params(options)
    with Client(connection) as client:
        while (question := _ask()) is not None:
            if not question.strip():
                continue
            messages.append({"role": "user", "content": question})
            request = chat_request(messages, **params)
            set_request_fields(request, options)
            generation = client.generate(request, options.timeout)
            try:
                answer = stream_text(generation)
            except CallFailed as error:
                begun = "\n" if generation.started is not None else ""
                print(f"{begun}lockstep chat: {error}", file=sys.stderr)
                return 1
            except KeyboardInterrupt:
                # Enough of this answer; the conversation goes on without it.
                generation.cancel()
                messages.pop()
                print()
                continue
            messages.append({"role": "assistant", "content": answer})
    return 0


def _ask() -> str | None:
    """The next line of input; None at its end or on Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep chat", description=__doc__)
    add_connection_flags(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--timeout", type=float, metavar="S", help="limit for an answer, seconds")
    add_sampling_flags(parser)
    add_request_flags(parser)
    return parser
