"""Command-line flags, with environment and file behind them.

A flag wins over LOCKSTEP_<FLAG>, that over the --config TOML, that over the default.

Anything unknown or unparsable in any of the three stops the start with one line.
"""

import argparse
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ENV_PREFIX = "LOCKSTEP_"


class FlagError(Exception):
    """A setting is unknown or does not parse; the message names it, its value and its source."""


@dataclass(frozen=True)
class Flag:
    """One setting.

    `parse` turns the text of the command line or environment into the value and raises ValueError
    with what it wanted; `name` is spelled as on the command line without the dashes. `bare` is the
    text that the flag alone, without a value, stands for; None: it wants one.
    """

    name: str
    parse: Callable[[str], Any]
    default: Any
    help: str
    bare: str | None = None

    @property
    def dest(self) -> str:
        return self.name.replace("-", "_")

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.dest.upper()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FlagError(message)


def parse_flags(
    program: str,
    flags: Sequence[Flag],
    argv: Sequence[str],
    environ: Mapping[str, str],
    known_elsewhere: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Returns `dest -> value` for every flag.

    `known_elsewhere` are names (dashes, as in `Flag.name`) that other daemons own: they may stand
    in the environment and the file, which daemons share, without being an error here.
    Raises FlagError. `--help` prints and exits as argparse does.
    """
    parser = _Parser(prog=program, allow_abbrev=False)
    parser.add_argument("--config", metavar="TOML", help="file of settings, named like the flags")
    for flag in flags:
        parser.add_argument(
            f"--{flag.name}",
            default=None,
            help=help_text(flag),
            metavar=_metavar(flag),
            nargs=None if flag.bare is None else "?",
            const=flag.bare,
        )
    given = vars(parser.parse_args(list(argv)))
    config_path = given.pop("config") or environ.get(ENV_PREFIX + "CONFIG")
    from_file = _read_file(config_path, flags, known_elsewhere) if config_path else {}
    _refuse_unknown_env(flags, environ, known_elsewhere)
    return {flag.dest: _resolve(flag, given, environ, from_file) for flag in flags}


def help_text(flag: Flag) -> str:
    """What `--help` says of a flag, with its default as one would type it."""
    if flag.default in (None, "", ()):
        return flag.help
    default = flag.default
    if isinstance(default, bool):
        default = "on" if default else "off"
    elif isinstance(default, float):
        default = f"{default:g}"
    return f"{flag.help} (default: {default})"


def _metavar(flag: Flag) -> str:
    if flag.parse is on_off:
        return "{on,off}"
    if isinstance(flag.parse, _Choice):
        return f"{{{','.join(flag.parse.options)}}}"
    return "N" if isinstance(flag.default, int | float) else "VALUE"


def _resolve(
    flag: Flag,
    given: Mapping[str, Any],
    environ: Mapping[str, str],
    from_file: Mapping[str, Any],
) -> Any:
    if given[flag.dest] is not None:
        return _parse(flag, given[flag.dest], f"--{flag.name}")
    if flag.env in environ:
        return _parse(flag, environ[flag.env], flag.env)
    if flag.dest in from_file:
        return _parse(flag, from_file[flag.dest], f"{flag.name} in --config")
    return flag.default


def _parse(flag: Flag, text: str, source: str) -> Any:
    try:
        return flag.parse(text)
    except ValueError as error:
        raise FlagError(f"{source}: {text!r} is not valid: {error}") from None


def _read_file(path: str, flags: Sequence[Flag], known_elsewhere: frozenset[str]) -> dict[str, str]:
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FlagError(f"--config {path}: {error}") from None
    names = {flag.dest for flag in flags} | {name.replace("-", "_") for name in known_elsewhere}
    values: dict[str, str] = {}
    for key, value in content.items():
        dest = key.replace("-", "_")
        if dest not in names:
            raise FlagError(f"--config {path}: unknown setting {key!r}")
        if isinstance(value, list):
            values[dest] = ",".join(str(item) for item in value)
        elif isinstance(value, bool):
            values[dest] = "on" if value else "off"
        elif isinstance(value, str | int | float):
            values[dest] = str(value)
        else:
            raise FlagError(f"--config {path}: {key!r} must be a string, number, boolean or list")
    return values


def _refuse_unknown_env(
    flags: Sequence[Flag], environ: Mapping[str, str], known_elsewhere: frozenset[str]
) -> None:
    known = {flag.env for flag in flags} | {ENV_PREFIX + "CONFIG"}
    known |= {ENV_PREFIX + name.replace("-", "_").upper() for name in known_elsewhere}
    for name in environ:
        if name.startswith(ENV_PREFIX) and name not in known:
            raise FlagError(f"environment variable {name} is no setting of lockstep")


def positive_int(text: str) -> int:
    """At least 1."""
    return int_at_least(1)(text)


def int_at_least(minimum: int) -> Callable[[str], int]:
    """A parser for integers from `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError("want an integer") from None
        if value < minimum:
            raise ValueError(f"want at least {minimum}")
        return value

    return parse


def float_between(low: float, high: float) -> Callable[[str], float]:
    """A parser for numbers in [low, high]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError("want a number") from None
        if not low <= value <= high:
            raise ValueError(f"want {low} to {high}")
        return value

    return parse


@dataclass(frozen=True)
class _Choice:
    options: tuple[str, ...]

    def __call__(self, text: str) -> str:
        if text not in self.options:
            raise ValueError(f"want one of {', '.join(self.options)}")
        return text


def choice(*options: str) -> Callable[[str], str]:
    """A parser for one of `options`."""
    return _Choice(options)


def on_off(text: str) -> bool:
    """A parser for "on" and "off"."""
    return choice("on", "off")(text) == "on"


def byte_size(text: str) -> int:
    """Bytes, or a number with K, M, G or T (powers of 1024)."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    digits, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    if not digits.isdigit():
        raise ValueError("want bytes, or a number with K, M, G or T")
    return int(digits) * unit


def tcp_port(text: str) -> int:
    """0 (any free port) to 65535."""
    value = int_at_least(0)(text)
    if value > 65535:
        raise ValueError("want 0 to 65535")
    return value
