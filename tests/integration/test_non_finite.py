"""A NaN among the weights ends the requests that meet it, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from safetensors.torch import load_file, save_file

from lockstep.errors import CallFailed
from tests.helpers.message_client import ids_request
from tests.helpers.served_group import ServedGroup, value_of
from tests.helpers.tiny_models import write_tiny_model
from tests.integration.conftest import CPU_FLAGS

_LIMIT_S = 60.0
_POISONED_ID = 77
_FLAGS = (*CPU_FLAGS, "--tp", "2", "--kv-cache-bytes", "256K", "--max-model-len", "256")


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGroup]:
    """A model whose embedding of one token is NaN; its LM head is another tensor."""
    folder = tmp_path_factory.mktemp("non-finite")
    write_tiny_model(folder / "model", tie_word_embeddings=False)
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][_POISONED_ID] = float("nan")
    save_file(tensors, path)
    with ServedGroup(folder / "model", folder / "group", *_FLAGS) as group:
        yield group


def test_only_the_request_that_meets_a_nan_ends_with_internal(group: ServedGroup) -> None:
    healthy = ids_request([5, 6, 7], temperature=0.0, max_tokens=100, ignore_eos=True)
    poisoned = ids_request([5, _POISONED_ID, 7], temperature=0.0, max_tokens=100)
    with group.client() as client:
        epoch = client.server_info().epoch
        alone = list(client.generate_unary(healthy, timeout_s=_LIMIT_S).output.token_ids)
        assert _POISONED_ID not in alone[:-1]
        beside = client.generate(healthy, timeout_s=_LIMIT_S)
        deltas = iter(beside)
        received = list(next(deltas).token_ids)
        for _ in range(3):
            with pytest.raises(CallFailed, match=r"INTERNAL: .*finite"):
                client.generate_unary(poisoned, timeout_s=_LIMIT_S)
        received += [token for delta in deltas for token in delta.token_ids]
        assert received == alone
        assert client.server_info().epoch == epoch  # no rank was lost over it
    assert value_of(group.metrics, "lockstep_requests_failed_total", code="internal") == 3
