"""A model to serve, and what holds for every refusal that a test of the frontend provokes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor

from coordinator.frontend import rejections
from coordinator.frontend.error_details import field_path
from coordinator.frontend.tokenizer import Tokenizer
from tests.unit.coordinator.frontend.fake_engine import write_text_model
from tests.unit.coordinator.frontend.field_paths import is_field


@pytest.fixture(autouse=True)
def refusals_name_fields_of_the_request(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each path is one of the message that was sent; "request" only where nothing has a name."""
    wrong: list[tuple[str, str, str]] = []

    def checked(named: str, message: Descriptor) -> str:
        path = field_path(named, message)
        has_no_name = named == "request" or named.startswith("field ")
        if path != "request" if has_no_name else not is_field(path, message):
            wrong.append((message.full_name, named, path))
        return path

    monkeypatch.setattr(rejections, "field_path", checked)
    yield
    assert not wrong


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def encode(model: Path) -> Callable[[str], list[int]]:
    return Tokenizer.from_dir(model).encode
