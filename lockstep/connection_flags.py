"""Command-line flags of a connection, for the commands that call a server."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from lockstep.client.config import ClientConfig, RetryPolicy, Tls
from lockstep.errors import ConfigError

_DEFAULT_ADDRESS = "127.0.0.1:50051"
_KEY_VARIABLE = "LOCKSTEP_API_KEY"


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """As `add_reach_flags`, and --timeout, --retries and --resume."""
    group = add_reach_flags(parser)
    group.add_argument("--timeout", type=float, metavar="S", help="limit for an answer, seconds")
    text = "attempts beyond the first while the server is full or away (default: 0)"
    group.add_argument("--retries", type=int, default=0, metavar="N", help=text)
    text = "an answer that breaks off goes on where it was, within --retries"
    group.add_argument("--resume", action="store_true", help=text)


def add_reach_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds --address, --api-key-file and --tls with its files; returns their group."""
    group = parser.add_argument_group("connection")
    text = f"host:port of the server (default: {_DEFAULT_ADDRESS})"
    group.add_argument("--address", default=_DEFAULT_ADDRESS, metavar="HOST:PORT", help=text)
    text = f"file that holds the API key (default: the variable {_KEY_VARIABLE}, if set)"
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help=text)
    group.add_argument("--tls", action="store_true", help="encrypt, with the system's certificates")
    text = "certificates that the server's must come from; as those below, it implies --tls"
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help=text)
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="our certificate (mutual TLS)")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="the key of --tls-cert")
    text = "name in the server's certificate (default: the host of --address)"
    group.add_argument("--tls-server-name", metavar="NAME", help=text)
    return group


def client_config(options: argparse.Namespace, environ: Mapping[str, str]) -> ClientConfig:
    """Of `add_connection_flags`. Raises ConfigError for what does not fit or cannot be read."""
    if options.retries < 0:
        raise ConfigError(f"--retries is {options.retries}; it must be at least 0")
    given = {} if options.timeout is None else {"timeout_s": options.timeout}
    return dataclasses.replace(
        reach_config(options, environ),
        retry=RetryPolicy(max_attempts=1 + options.retries),
        resume=options.resume,
        **given,
    )


def reach_config(options: argparse.Namespace, environ: Mapping[str, str]) -> ClientConfig:
    """Of `add_reach_flags`. Raises ConfigError as `client_config`."""
    return ClientConfig(tls=_tls(options), api_key=_api_key(options.api_key_file, environ))


def _tls(options: argparse.Namespace) -> Tls | None:
    named = (options.tls_ca, options.tls_cert, options.tls_key, options.tls_server_name)
    if not options.tls and all(value is None for value in named):
        return None
    return Tls(
        ca=options.tls_ca,
        cert=options.tls_cert,
        key=options.tls_key,
        server_name=options.tls_server_name,
    )


def _api_key(file: Path | None, environ: Mapping[str, str]) -> str | None:
    if file is None:
        return environ.get(_KEY_VARIABLE)
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file: cannot read {file}: {error}") from error
