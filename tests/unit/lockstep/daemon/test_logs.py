"""Log lines for machines."""

import json
import logging
from collections.abc import Iterator

import pytest

from lockstep.daemon.logs import configure_logging


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_a_json_line_has_the_fields_of_what_it_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "coordinator")
    fields = {"request_id": "r-1", "rank": 3, "epoch": 17, "step": 8}
    logging.getLogger("a.b").error("lost %s", "x", extra=fields)
    logging.getLogger("a.b").info("nothing in particular")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "error",
        "role": "coordinator",
        "logger": "a.b",
        "message": "lost x",
        **fields,
    }
    assert set(second) == {"time", "level", "role", "logger", "message"}


def test_a_text_line_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("text", "worker 1")
    logging.getLogger("a").warning("w", extra={"rank": 1})
    assert capsys.readouterr().err.endswith(" worker 1 WARNING w\n")
