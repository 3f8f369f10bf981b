"""Whose blocks a sequence may take over instead of computing the same positions again.

Only full blocks are shared. Keys are salted with the tenant's name, which keeps one tenant from
seeing by its latency what another has asked; samples of one call that may not share with others
have a salt of their own.

A block becomes findable once the commands that fill it are sent: commands run in order, so whoever
finds it runs later. For a generated block that is known when the token after it is reported; it is
made findable when its sequence leaves its slot, since until then hardly anyone could continue it.
"""

from collections.abc import Sequence

from coordinator.block_allocator import BlockAllocator
from coordinator.prefix_keys import PrefixKeys
from coordinator.request import Request

_TENANT, _GROUP = b"tenant:", b"group:"


class PrefixCache:
    """Finds and registers blocks by what they hold. Owned by the event loop.

    With `is_on` False only samples of one call share.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int, is_on: bool) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._is_on = is_on
        self._num_groups = 0
        self._num_queries = 0
        self._num_hits = 0

    def enrol(self, request: Request) -> None:
        """Hashes the tokens of a new request that takes part; later calls only look up."""
        if self._is_on and request.use_prefix_cache:
            self._give_keys(request, _TENANT + request.tenant.encode())
        elif request.leader is not None and not request.leader.is_finished:
            self._join_group(request, request.leader)

    def find(self, request: Request) -> Sequence[int]:
        """The blocks that a request without a slot could start with.

        At least one token is left to compute: without, there would be no logits to choose from. A
        request that wants log-probabilities of its prompt has all of it left to compute.
        """
        prefix_keys = request.prefix_keys
        if prefix_keys is None or request.awaits_prompt_scores:
            return ()
        num_blocks = (request.num_to_prefill - 1) // self._block_size
        prefix_keys.extend(request.tokens_from, num_blocks, self._block_size)
        return self._allocator.find(prefix_keys.keys[:num_blocks])

    def take(self, request: Request, block_ids: Sequence[int]) -> None:
        """Blocks that were found become the first ones of a request that has just got its slot."""
        self._allocator.share(block_ids)
        request.block_ids = list(block_ids)
        if request.prefix_keys is not None:
            request.prefix_keys.num_registered = len(block_ids)
            self._num_queries += request.prefill_len
            self._num_hits += request.cached_len

    def chunk_sent(self, request: Request) -> None:
        """Registers the blocks that the chunks sent so far have filled."""
        self._register(request, request.num_prefilled)

    def leave(self, request: Request) -> None:
        """A request is about to lose its slot: registers the blocks that its output has filled."""
        num_computed = request.num_prefilled
        if num_computed == request.prefill_len:
            # Whoever chose a token has computed the position before it.
            num_computed = max(num_computed, request.num_to_prefill - 1)
        self._register(request, num_computed)

    def distrust(self, request: Request) -> None:
        """Nobody is to find a request's blocks any more: its logits were not finite."""
        if request.prefix_keys is not None:
            self._allocator.forget(request.prefix_keys.keys)
            request.prefix_keys = None

    def take_counts(self) -> tuple[int, int]:
        """(tokens looked up, tokens found) on admission since the last call."""
        counts = self._num_queries, self._num_hits
        self._num_queries = self._num_hits = 0
        return counts

    def _join_group(self, request: Request, leader: Request) -> None:
        """A sample shares with its leader and nobody else."""
        if leader.prefix_keys is None:
            self._num_groups += 1
            self._give_keys(leader, _GROUP + b"%d" % self._num_groups)
            self.chunk_sent(leader)
        assert leader.prefix_keys is not None
        if leader.prefix_keys.salt.startswith(_GROUP):
            self._give_keys(request, leader.prefix_keys.salt)

    def _give_keys(self, request: Request, salt: bytes) -> None:
        request.prefix_keys = PrefixKeys(salt)
        num_blocks = request.num_to_prefill // self._block_size
        request.prefix_keys.extend(request.tokens_from, num_blocks, self._block_size)

    def _register(self, request: Request, num_computed: int) -> None:
        prefix_keys = request.prefix_keys
        if prefix_keys is None:
            return
        num_full = min(num_computed // self._block_size, len(request.block_ids))
        prefix_keys.extend(request.tokens_from, num_full, self._block_size)
        for index in range(prefix_keys.num_registered, num_full):
            self._allocator.register(request.block_ids[index], prefix_keys.keys[index])
        prefix_keys.num_registered = max(prefix_keys.num_registered, num_full)
