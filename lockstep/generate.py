"""`lockstep generate`: one prompt, its text as it comes."""

import argparse
import sys
from collections.abc import Sequence

from lockstep.client import Client, Generation, chat_request, ids_request, text_request
from lockstep.errors import CallFailed
from lockstep.sampling_flags import add_sampling_flags, sampling_params
from protos.lockstep.v1 import generate_pb2

_DEFAULT_ADDRESS = "127.0.0.1:50051"
_INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Runs one request; returns 0, 1 if the call failed, 130 if it was interrupted."""
    options = _parser().parse_args(argv)
    with Client(options.address) as client:
        generation = client.generate(_request(options), options.timeout)
        try:
            if options.ids:
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
    if options.verbose:
        print(_summary(generation), file=sys.stderr)
    return 0


def add_address_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --address."""
    text = f"host:port of the server (default: {_DEFAULT_ADDRESS})"
    parser.add_argument("--address", default=_DEFAULT_ADDRESS, metavar="HOST:PORT", help=text)


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


def _request(options: argparse.Namespace) -> generate_pb2.GenerateRequest:
    params = sampling_params(options)
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
    reason = generate_pb2.FinishReason.Name(finished.finish_reason).removeprefix("FINISH_REASON_")
    return (
        f"request {started.request_id}, seed {started.seed}: {finished.usage.prompt_token_count} "
        f"prompt + {finished.usage.output_token_count} output tokens, ended by {reason.lower()}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep generate", description=__doc__)
    add_address_flag(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--token-ids", type=_token_ids, metavar="1,2,3", help="ids to continue")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's chat message")
    parser.add_argument("--ids", action="store_true", help="print token ids, not their text")
    parser.add_argument("--timeout", type=float, metavar="S", help="limit for the call, seconds")
    parser.add_argument("--verbose", action="store_true", help="say what it took")
    add_sampling_flags(parser)
    return parser
