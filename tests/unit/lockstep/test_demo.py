"""What `lockstep demo` makes of a server's answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import pytest

from lockstep import demo
from lockstep.client import Client, ServerInfo
from lockstep.client.wire import server_info_of
from protos.lockstep.v1 import generate_pb2


class _ScriptedClient:
    """Answers `server_info` with one list of all-reduce counts after the other."""

    def __init__(self, *counts: Sequence[int]) -> None:
        self._counts: Iterator[Sequence[int]] = iter(counts)

    def server_info(self) -> ServerInfo:
        ranks = [generate_pb2.RankInfo(all_reduce_count=count) for count in next(self._counts)]
        return server_info_of(generate_pb2.GetServerInfoResponse(ranks=ranks))


def _counts_shown(client: _ScriptedClient) -> list[int]:
    return [rank.all_reduce_count for rank in demo._ranks_at_rest(cast(Client, client))]


def test_the_table_waits_until_every_rank_has_reported_its_last_step() -> None:
    assert _counts_shown(_ScriptedClient([9, 5], [9, 8], [9, 9])) == [9, 9]


def test_the_table_does_not_show_a_state_from_before_the_answer() -> None:
    assert _counts_shown(_ScriptedClient([0, 0], [9, 0], [9, 9])) == [9, 9]


def test_ranks_that_never_agree_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_REST_LIMIT_S", -1.0)
    assert _counts_shown(_ScriptedClient([9, 5], [9, 9])) == [9, 5]
