"""`lockstep generate`: one prompt, its text as it comes."""

import argparse
import sys
from collections.abc import Sequence

from lockstep.client import Client, Generation, chat_request, ids_request, text_request
from lockstep.connection import Connection, add_connection_flags
from lockstep.daemon.exit_codes import ExitCode
from lockstep.errors import CallFailed, ConfigError
from lockstep.sampling_flags import (
    add_request_flags,
    add_sampling_flags,
    sampling_params,
    set_request_fields,
)
from protos.lockstep.v1 import generate_pb2

_INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Runs one request; returns 0, 1 if the call failed, 2 for wrong flags, 130 if interrupted."""
    options = _parser().parse_args(argv)
    try:
        connection = Connection.of_options(options)
    except ConfigError as error:
        print(f"lockstep generate: {error}", file=sys.stderr)
        return ExitCode.CONFIG
    with Client(connection) as client:
        generation = client.generate(_request(options), options.timeout)
        try:
            if options.n is not None and options.n > 1:
                print_samples(generation, options.ids)
            elif options.ids:
                stream_ids(generation)
            else:
                stream_text(generation)
        except CallFailed as error:
            # What has been printed of the answer ends without a newline.
            begun = "\n" if generation.started is not None else ""
            print(f"{begun}lockstep generate: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            generation.cancel()
            return _INTERRUPTED
        finally:
            if options.times and generation.times:
                print(_times(generation), file=sys.stderr)
    if options.verbose:
        print(_summary(generation), file=sys.stderr)
    return 0


def stream_text(generation: Generation) -> str:
    """Prints the text as it comes and returns it."""
    texts = []
    for delta in generation:
        texts.append(delta.text)
        print(delta.text, end="", flush=True)
    print(flush=True)
    return "".join(texts)


def stream_ids(generation: Generation) -> None:
    """Prints the token ids as they come."""
    for delta in generation:
        print(*delta.token_ids, end=" ", flush=True)
    print(flush=True)


def print_samples(generation: Generation, as_ids: bool) -> None:
    """Prints several samples one after another, each below its number, once all have ended."""
    samples: dict[int, list[generate_pb2.Delta]] = {}
    for delta in generation:
        samples.setdefault(delta.sample_index, []).append(delta)
    for index in sorted(generation.finished_samples):
        deltas = samples.get(index, [])
        ids = (str(token_id) for delta in deltas for token_id in delta.token_ids)
        text = " ".join(ids) if as_ids else "".join(delta.text for delta in deltas)
        print(f"--- {index}\n{text}", flush=True)


def _request(options: argparse.Namespace) -> generate_pb2.GenerateRequest:
    request = _prompt_request(options)
    set_request_fields(request, options)
    return request


def _prompt_request(options: argparse.Namespace) -> generate_pb2.GenerateRequest:
    params = sampling_params(options)
    if options.n is not None:
        params["n"] = options.n
    if options.token_ids is not None:
        return ids_request(options.token_ids, **params)
    if options.chat:
        return chat_request([{"role": "user", "content": options.prompt}], **params)
    return text_request(options.prompt, **params)


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of ids like 1,2,3") from None


def _summary(generation: Generation) -> str:
    started, finished = generation.started, generation.finished
    assert started is not None and finished is not None
    num_output_tokens = sum(
        sample.usage.output_token_count for sample in generation.finished_samples.values()
    )
    reason = generate_pb2.FinishReason.Name(finished.finish_reason).removeprefix("FINISH_REASON_")
    return (
        f"request {started.request_id}, seed {started.seed}: {finished.usage.prompt_token_count} "
        f"prompt + {num_output_tokens} output tokens, ended by {reason.lower()}"
    )


def _times(generation: Generation) -> str:
    """Where the time went, as "queue-ms 0.310, prefill-ms 12.004, ..."."""
    return ", ".join(
        f"{key.removeprefix('lockstep-')} {value}" for key, value in generation.times.items()
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep generate", description=__doc__)
    add_connection_flags(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--token-ids", type=_token_ids, metavar="1,2,3", help="ids to continue")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's chat message")
    parser.add_argument("--ids", action="store_true", help="print token ids, not their text")
    parser.add_argument("--timeout", type=float, metavar="S", help="limit for the call, seconds")
    parser.add_argument("--verbose", action="store_true", help="say what it took")
    parser.add_argument("--times", action="store_true", help="say where the time went")
    parser.add_argument("--n", type=int, metavar="N", help="outputs to generate (default: 1)")
    add_sampling_flags(parser)
    add_request_flags(parser)
    return parser
