"""A real gateway under `lockstep simulate --http`: its end, the group's, and a stop in order."""

from __future__ import annotations

import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.helpers.served_group import ServedGroup

pytestmark = [pytest.mark.http, pytest.mark.timeout(240)]

MODEL = "sim"
_LIMIT_S = 60.0
_POLL_S = 0.1
_FLAGS = (
    *("--served-model-name", MODEL, "--step-ms", "10", "--token-text", "ascii"),
    *("--drain-seconds", "20", "--http", "127.0.0.1:0"),
)


@pytest.fixture
def group(smollm2_dir: Path, tmp_path: Path) -> Iterator[ServedGroup]:
    with ServedGroup(smollm2_dir, tmp_path, *_FLAGS, subcommand="simulate") as group:
        yield group


def client_of(group: ServedGroup) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://{group.http}/v1", api_key="none", max_retries=0, timeout=_LIMIT_S
    )


def complete(client: openai.OpenAI, **params: Any) -> Any:
    return client.completions.create(model=MODEL, prompt="hello", temperature=0, seed=1, **params)


def complete_in_time(client: openai.OpenAI) -> str:
    """An answer, once the gateway and the group can give one again."""
    deadline = time.monotonic() + _LIMIT_S
    while True:
        try:
            return str(complete(client, max_tokens=4).choices[0].text)
        except (openai.APIConnectionError, openai.InternalServerError) as error:
            last: openai.OpenAIError = error
        except openai.NotFoundError as error:  # it listens before it knows its worker
            assert "No worker available" in str(error)
            last = error
        assert time.monotonic() < deadline, last
        time.sleep(_POLL_S)


def gateway_of(group: ServedGroup) -> psutil.Process:
    """It renames itself."""
    return next(child for child in group.members() if "smg::router" in child.cmdline()[0])


def coordinator_of(group: ServedGroup) -> psutil.Process:
    return next(
        child
        for child in group.members()
        if child.cmdline()[-1:] and "--workers" in child.cmdline()
    )


def test_a_killed_gateway_and_a_killed_coordinator_come_back(group: ServedGroup) -> None:
    with client_of(group) as client:
        answer = complete_in_time(client)
        gateway_of(group).kill()
        assert complete_in_time(client) == answer
        coordinator_of(group).kill()
        assert complete_in_time(client) == answer
    assert group.stop() == 0


def test_a_stream_that_runs_at_sigterm_is_finished(group: ServedGroup) -> None:
    with client_of(group) as client:
        chunks = complete(client, max_tokens=200, stream=True, extra_body={"ignore_eos": True})
        first = next(chunks)
        group.process.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in (first, *chunks) if chunk.choices]
        assert reasons[-1] == "length"
    assert group.wait_exit() == 0
    assert "drained" in group.log_text()


def test_an_address_in_use_stops_the_start(smollm2_dir: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = (*_FLAGS[:-1], address)
        group = ServedGroup(smollm2_dir, tmp_path, *flags, subcommand="simulate")
        assert group.wait_exit() == 5
    assert re.search(f"cannot listen on {address}.*--http", group.log_text())
