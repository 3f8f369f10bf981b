"""What a fake worker's KV blocks hold, and the proof that a cached prefix is the right one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class _Written:
    """Token ids of one block from its first position on; `parent` stands for all ids before it."""

    parent: int
    token_ids: list[int] = field(default_factory=list)


class BlockRecord:
    """Which tokens were last written to each block, and after which prefix."""

    def __init__(self) -> None:
        self._written: dict[int, _Written] = {}

    def write(
        self, block_id: int, token_ids: Sequence[int], position: int, block_size: int
    ) -> None:
        """Notes that the K and V of `token_ids[position]` were written, its sequence so far."""
        start = position - position % block_size
        if position == start:
            # Whatever the block held is void, its end too.
            self._written[block_id] = _Written(_prefix_key(token_ids[:start]))
        held = self._written[block_id]
        assert len(held.token_ids) == position - start, f"block {block_id} is written out of turn"
        held.token_ids.append(token_ids[position])

    def write_again(
        self, block_id: int, token_ids: Sequence[int], position: int, block_size: int
    ) -> None:
        """The same for a block that others hold too: what it holds must come out as it was."""
        start = position - position % block_size
        parent = _prefix_key(token_ids[:start])
        held = self._written.setdefault(block_id, _Written(parent))
        assert held.parent == parent, f"shared block {block_id} is written after another prefix"
        if len(held.token_ids) == position - start:
            held.token_ids.append(token_ids[position])
        is_same = held.token_ids[position - start : position - start + 1] == [token_ids[position]]
        assert is_same, f"shared block {block_id} gets another token"

    def cached(self, block_ids: Sequence[int], block_size: int) -> tuple[list[int], str]:
        """The token ids that these blocks hold as one prefix; or none, and what is wrong."""
        token_ids = list[int]()
        for index, block_id in enumerate(block_ids):
            held = self._written.get(block_id)
            if held is None or len(held.token_ids) < block_size:
                count = len(held.token_ids) if held else 0
                return [], f"cached block {block_id} holds {count} of {block_size} positions"
            if held.parent != _prefix_key(token_ids):
                return [], f"cached block {block_id} was not written after its prefix, at {index}"
            token_ids += held.token_ids
        return token_ids, ""


def _prefix_key(token_ids: Sequence[int]) -> int:
    return hash(tuple(token_ids))
