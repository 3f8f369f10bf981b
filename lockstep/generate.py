"""`lockstep generate`: one prompt, its text as it comes."""

import argparse
import os
import sys
from collections.abc import Sequence

from lockstep.client import (
    CallFailed,
    Chat,
    ChatMessage,
    Client,
    ConfigError,
    Delta,
    GenerateRequest,
    Generation,
    Prompt,
    SamplingParams,
)
from lockstep.connection_flags import add_connection_flags, client_config
from lockstep.daemon.exit_codes import ExitCode
from lockstep.sampling_flags import (
    add_request_flags,
    add_sampling_flags,
    int32,
    request_fields,
    sampling_params,
)

_INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Runs one request; returns 0, 1 if the call failed, 2 for bad settings, 130 if interrupted."""
    options = _parser().parse_args(argv)
    try:
        client = Client(options.address, client_config(options, os.environ))
        request = _request(options)
        if options.resume and request.sampling.n not in (None, 1):
            raise ConfigError("--resume is of one output; leave --n out")
    except ConfigError as error:
        print(f"lockstep generate: {error}", file=sys.stderr)
        return ExitCode.CONFIG
    with client:
        return _run(client, request, options)


def _run(client: Client, request: GenerateRequest, options: argparse.Namespace) -> int:
    with client.generate(request) as generation:
        try:
            _print_output(generation, options)
        except CallFailed as error:
            # What has been printed of the answer ends without a newline.
            begun = "\n" if generation.started is not None else ""
            print(f"{begun}lockstep generate: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
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
    samples: dict[int, list[Delta]] = {}
    for delta in generation:
        samples.setdefault(delta.sample_index, []).append(delta)
    for index in sorted(generation.finished_samples):
        deltas = samples.get(index, [])
        ids = (str(token_id) for delta in deltas for token_id in delta.token_ids)
        text = " ".join(ids) if as_ids else "".join(delta.text for delta in deltas)
        print(f"--- {index}\n{text}", flush=True)


def _print_output(generation: Generation, options: argparse.Namespace) -> None:
    if options.n is not None and options.n > 1:
        print_samples(generation, options.ids)
    elif options.ids:
        stream_ids(generation)
    else:
        stream_text(generation)


def _request(options: argparse.Namespace) -> GenerateRequest:
    params = SamplingParams(**sampling_params(options), n=options.n)
    return GenerateRequest(_prompt(options), params, **request_fields(options))


def _prompt(options: argparse.Namespace) -> Prompt:
    if options.token_ids is not None:
        ids: list[int] = options.token_ids
        return ids
    text: str = options.prompt
    return Chat([ChatMessage("user", text)]) if options.chat else text


def _token_ids(text: str) -> list[int]:
    try:
        return [int32(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of ids like 1,2,3") from None


def _summary(generation: Generation) -> str:
    started, finished = generation.started, generation.finished
    assert started is not None and finished is not None
    num_output_tokens = sum(
        sample.usage.output_token_count for sample in generation.finished_samples.values()
    )
    return (
        f"request {started.request_id}, seed {started.seed}: {finished.usage.prompt_token_count} "
        f"prompt + {num_output_tokens} output tokens, ended by {finished.finish_reason.value}"
    )


def _times(generation: Generation) -> str:
    """Where the time went, as "queue-ms 0.310, prefill-ms 12.004, ..."."""
    return ", ".join(
        f"{key.removeprefix('lockstep-')} {value}" for key, value in generation.times.items()
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lockstep generate", description=__doc__)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--token-ids", type=_token_ids, metavar="1,2,3", help="ids to continue")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's chat message")
    parser.add_argument("--ids", action="store_true", help="print token ids, not their text")
    parser.add_argument("--verbose", action="store_true", help="say what it took")
    parser.add_argument("--times", action="store_true", help="say where the time went")
    parser.add_argument("--n", type=int32, metavar="N", help="outputs to generate (default: 1)")
    add_sampling_flags(parser)
    add_request_flags(parser)
    add_connection_flags(parser)
    return parser
