"""What docs/client.md shows runs as it stands there, against a scripted server."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lockstep import client
from tests.helpers.scripted_server import TEXT, ScriptedServer, scores, serving

_TEXT = (Path(__file__).resolve().parents[2] / "docs" / "client.md").read_text(encoding="utf-8")
_BLOCKS = re.findall(r"```python\n(.*?)```", _TEXT, re.DOTALL)
_ADAPTER = next(block for block in _BLOCKS if "TemplateLM" in block)
_RUNNABLE = [block for block in _BLOCKS if '"127.0.0.1:50051"' in block and block != _ADAPTER]


@pytest.fixture
def server() -> ScriptedServer:
    return ScriptedServer()


@pytest.fixture
def address(server: ScriptedServer) -> Iterator[str]:
    with serving(server) as address:
        yield address


def test_every_block_is_looked_at() -> None:
    assert len(_BLOCKS) == 7 and len(_RUNNABLE) == 5


@pytest.mark.parametrize("block", _RUNNABLE, ids=range(len(_RUNNABLE)))
def test_a_block_runs(
    block: str, server: ScriptedServer, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "score(" in block:
        server.plant(*[scores] * 5)
    exec(compile(block.replace("127.0.0.1:50051", address), "client.md", "exec"), {})
    assert server.requests
    assert TEXT in capsys.readouterr().out or "score(" in block


def test_the_blocks_that_need_files_or_a_harness_name_what_exists() -> None:
    for block in _BLOCKS:
        compile(block, "client.md", "exec")
        for names in re.findall(r"^from lockstep\.client import (.*)$", block, re.MULTILINE):
            assert all(hasattr(client, name.strip()) for name in names.split(","))


def test_the_adapter_scores_and_generates(
    server: ScriptedServer, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside stand-ins for the harness: lm-eval itself is not among the project's packages."""
    tokenizer = SimpleNamespace(
        encode=lambda text, add_special_tokens: [len(word) for word in text.split()],
        bos_token_id=None,
        eos_token_id=2,
        bos_token=None,
    )
    stand_ins: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": object},
        "lm_eval.utils": {
            "get_rolling_token_windows": lambda ids, first, length, step: [([first], ids)],
            "make_disjoint_window": lambda window: window,
        },
        "transformers": {"AutoTokenizer": SimpleNamespace(from_pretrained=lambda name: tokenizer)},
    }
    for name, members in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    names: dict[str, Any] = {}
    exec(compile(_ADAPTER, "client.md", "exec"), names)
    model = names["LockstepLM"](address, "somewhere", num_parallel=2)
    server.plant(scores, scores)
    pairs = [(("a", "b"), [5] * 100, [4]), (("a", "c"), [5], [3, 2])]
    assert model._loglikelihood_tokens(pairs) == [(-1.0, True), (-1.25, False)]
    # The longest prompt that leaves a place for a token.
    assert max(len(request.token_ids.ids) for request in server.requests) == 63
    server.plant(scores)
    assert model.loglikelihood_rolling([SimpleNamespace(args=("four by six",))]) == [-2.25]
    (text,) = model.generate_until([SimpleNamespace(args=("a b", {"until": "\n"}))])
    assert text == TEXT
    assert list(server.requests[-1].sampling_params.stop) == ["\n"]
    model.client.close()
