"""Command-line flags of one request, for the commands that send some."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any


def int32(text: str) -> int:
    """A flag's integer that a message can hold. Raises ArgumentTypeError."""
    return _integer(text, 32)


def int64(text: str) -> int:
    """As int32, of 64 bits."""
    return _integer(text, 64)


def _integer(text: str, num_bits: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
    if not -(2 ** (num_bits - 1)) <= value < 2 ** (num_bits - 1):
        raise argparse.ArgumentTypeError(f"{text} does not fit {num_bits} bits")
    return value


_NUMBERS: Mapping[str, Callable[[str], float]] = {
    "temperature": float,
    "top-p": float,
    "top-k": int32,
    "min-p": float,
    "seed": int64,
    "repetition-penalty": float,
    "presence-penalty": float,
    "frequency-penalty": float,
    "max-tokens": int32,
    "min-tokens": int32,
}


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --temperature and so on. What is left out takes the server's default."""
    group = parser.add_argument_group("sampling (default: what the model's makers say)")
    for name, kind in _NUMBERS.items():
        group.add_argument(f"--{name}", type=kind, metavar="N")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    group.add_argument("--include-stop", action="store_true", help="keep the stop text")
    group.add_argument(
        "--bad-word", action="append", metavar="TEXT", help="never say this; may be repeated"
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        type=_bias,
        metavar="ID=BIAS",
        help="add to a token's logit; may be repeated",
    )
    one = group.add_mutually_exclusive_group()
    one.add_argument("--json-schema", metavar="SCHEMA", help="JSON that this schema admits")
    one.add_argument("--json-object", action="store_true", help="a JSON object")
    one.add_argument("--regex", metavar="REGEX", help="a text that matches as a whole")
    one.add_argument("--choice", action="append", metavar="TEXT", help="one of these; repeat it")
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's end")


def sampling_params(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of SamplingParams that were given."""
    names = [*(name.replace("-", "_") for name in _NUMBERS), "stop", "json_schema", "regex"]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    switches = ("ignore_eos", "include_stop", "json_object")
    given |= {name: True for name in switches if getattr(options, name)}
    if options.choice:
        given["choice"] = options.choice
    if options.bad_word:
        given["bad_words"] = options.bad_word
    if options.logit_bias:
        given["logit_bias"] = dict(options.logit_bias)
    return given


def _bias(text: str) -> tuple[int, float]:
    token_id, _, value = text.partition("=")
    try:
        return int(token_id), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a bias like 42=-1.5") from None


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --priority, --tenant and --no-prefix-cache."""
    group = parser.add_argument_group("under load")
    group.add_argument("--priority", type=int32, metavar="N", help="lower goes first (default: 0)")
    group.add_argument("--tenant", metavar="NAME", help="tenants get equal shares")
    group.add_argument("--no-prefix-cache", action="store_true", help="compute the whole prompt")


def request_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of GenerateRequest that were given."""
    names = ("priority", "tenant")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return given | ({"use_prefix_cache": False} if options.no_prefix_cache else {})
