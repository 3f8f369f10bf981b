"""Long histories of a batch with a tiny cache, and what must hold after every move.

The rank runs a command when it is sent and its results are applied some moves later, as late as the
engine could get them. What the rank refuses, what the audit finds and what `History.check` finds
are all failures.
"""

import hashlib
import struct
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from coordinator.batch import Batch
from coordinator.request import Request, RequestState
from protos.lockstep.v1 import generate_pb2, worker_pb2
from tests.helpers.batch_history import BLOCK_SIZE, Rank, apply, make_batch, make_request
from tests.helpers.fake_worker import expected_output

MOVES = (
    *("arrive", "arrive", "continue_one", "sample", "abort"),
    *("send", "send", "send", "report", "mask", "mask"),
)
_NUM_BLOCKS = 11  # ten to give out: forty positions
_MAX_POSITIONS = 40
_MAX_UNREPORTED_STEPS = 12


class History:
    """A batch, its rank, and every request that ever came."""

    def __init__(self, seed: int, use_prefix_cache: bool = True) -> None:
        self.batch: Batch = make_batch(_NUM_BLOCKS, seed=seed, use_prefix_cache=use_prefix_cache)
        self.rank = Rank(self.batch)
        self.requests: list[Request] = []
        self.aborted: set[int] = set()
        self.unreported: deque[worker_pb2.StepResult] = deque()
        self._live: list[Request] = []
        self._num_masks = Counter[int]()  # that a constrained request has got, by order
        self._prefix_of_key: dict[bytes, tuple[int, ...]] = {}
        self._noted: dict[int, tuple[int, bytes]] = {}  # by order: tokens hashed, last key

    def move(self, kind: str, draw: Random) -> None:
        """One move and its check; `draw` fills in what the move leaves open."""
        getattr(self, f"_{kind}")(draw)
        self.check()

    def finish(self, draw: Random) -> None:
        """Moves on until every request has ended; the number of moves is bounded."""
        for _ in range(40 * (len(self.requests) + 1)):
            if not self._live and not self.unreported:
                break
            self._send(draw)
            self.check()
            for _ in range(draw.randint(1, 12)):
                self._report(draw)
                self._mask(draw)
            self.check()
        assert all(request.is_finished for request in self.requests), "somebody starves"
        assert self.batch.num_waiting == self.batch.num_running == 0
        allocator = self.batch.allocator
        assert allocator.num_free_blocks == allocator.num_usable_blocks
        for request in self.requests:
            is_aborted = request.order in self.aborted
            assert is_aborted or not request.awaits_prompt_scores, "a prompt not told as a whole"
            prompt = request.prompt_ids.tolist()
            wanted = expected_output(prompt, request.max_tokens, request.sampling.stop_ids)
            if request.order in self.aborted:
                wanted = wanted[: len(request.output_ids)]
            assert request.output_ids == wanted, f"request {request.order} got other tokens"

    def check(self) -> None:
        """What holds after every move, besides what the rank refuses."""
        self.batch.check()
        owned = {block for r in self._live for block in r.block_ids}
        allocator = self.batch.allocator
        assert allocator.num_free_blocks == allocator.num_usable_blocks - len(owned)
        self._check_cached_tokens()
        for request in self._live:
            if request.state is RequestState.PREFILLING and request.cached_len:
                self._check_may_share(request)
        self._live = [request for request in self._live if not request.is_finished]

    def _arrive(self, draw: Random) -> None:
        """A prompt whose beginning others have too."""
        prefix = [draw.choice((3, 5))] * (BLOCK_SIZE * draw.randint(0, 3))
        tail = [draw.randrange(2) for _ in range(draw.randint(1, 7))]
        self._add(draw, prefix + tail)

    def _continue_one(self, draw: Random) -> None:
        """The next turn of a conversation that has ended."""
        ended = [r for r in self.requests[-20:] if r.is_finished and r.num_to_prefill < 28]
        if ended:
            last = draw.choice(ended)
            self._add(draw, [*last.prompt_ids.tolist(), *last.output_ids, draw.randrange(2)], last)

    def _sample(self, draw: Random) -> None:
        """Another sample of a call whose first sample is in flight."""
        leaders = [r for r in self._live if not r.is_finished and r.leader is None]
        if leaders:
            leader = draw.choice(leaders)
            self._add(draw, leader.prompt_ids.tolist(), leader, leader)

    def _abort(self, draw: Random) -> None:
        running = [r for r in self._live if not r.is_finished]
        if running and not draw.randrange(3):
            request = draw.choice(running)
            self.aborted.add(request.order)
            self.batch.finish(request)

    def _send(self, draw: Random) -> None:
        if len(self.unreported) >= _MAX_UNREPORTED_STEPS:
            return
        active = [r for r in self._live if r.slot]
        oldest = min(active, key=lambda r: r.order, default=None)
        command = self.batch.next_command(True, max_steps=draw.choice((1, 1, 2, 3, 8)))
        assert oldest is None or oldest.state is not RequestState.PREEMPTED, "the oldest lost"
        if command is not None:
            self.unreported += self.rank.run(command)

    def _mask(self, draw: Random) -> None:
        """A mask comes some time after the token before it, and allows the right one alone."""
        due = [
            request
            for request in self._live
            if request.constraint is not None
            and not request.is_finished
            and self._num_masks[request.order] == len(request.output_ids)
        ]
        if not due:
            return
        request = draw.choice(due)
        self._num_masks[request.order] += 1
        num_outputs = len(request.output_ids) + 1
        token_id = expected_output(request.prompt_ids.tolist(), num_outputs)[-1]
        request.next_mask = worker_pb2.SlotMask(ids=struct.pack("<i", token_id))
        is_first = self.batch.mask_came(request)
        assert is_first == (num_outputs == 1)

    def _report(self, draw: Random) -> None:
        if self.unreported:
            apply(self.batch, self.unreported.popleft())

    def _add(
        self,
        draw: Random,
        prompt: Sequence[int],
        like: Request | None = None,
        leader: Request | None = None,
    ) -> None:
        max_tokens = draw.randint(1, min(14, _MAX_POSITIONS + 1 - len(prompt)))
        alone = expected_output(list(prompt), max_tokens)
        stop_ids = (draw.choice(alone),) if draw.randrange(3) == 0 else ()
        request = make_request(
            len(self.requests),
            prompt,
            max_tokens,
            stop_ids,
            repetition_penalty=draw.choice((1.0, 1.0, 1.5)),
            tenant=like.tenant if like else draw.choice(("", "", "other")),
            use_prefix_cache=like.use_prefix_cache if like else draw.randrange(5) > 0,
            leader=leader,
        )
        if draw.randrange(5) == 0 and leader is None:
            request.sampling = replace(request.sampling, num_prompt_logprobs=0)
        self.requests.append(request)
        self._live.append(request)
        if draw.randrange(4):
            self.batch.enqueue(request)
        else:
            request.constraint = generate_pb2.SamplingParams(regex="any")
            self.batch.await_mask(request)

    def _check_cached_tokens(self) -> None:
        """Every block that can be found holds what its key stands for, as the rank wrote it."""
        for request in self._live:
            self._note_keys(request)
        written = self.rank.tables._blocks._written
        for key, block_id in self.batch.allocator._block_of.items():
            assert key in self._prefix_of_key, "a key that stands for no request's tokens"
            prefix = self._prefix_of_key[key]
            assert written[block_id].token_ids == list(prefix[-BLOCK_SIZE:])
            assert written[block_id].parent == hash(prefix[:-BLOCK_SIZE])

    def _note_keys(self, request: Request) -> None:
        """The keys of a request's full blocks by a hash chain of our own."""
        if request.prefix_keys is None:
            return
        token_ids = (*request.prompt_ids.tolist(), *request.output_ids)
        noted, key = self._noted.get(
            request.order, (0, hashlib.sha256(request.prefix_keys.salt).digest())
        )
        for end in range(noted + BLOCK_SIZE, len(token_ids) + 1, BLOCK_SIZE):
            block = struct.pack(f"<{BLOCK_SIZE}i", *token_ids[end - BLOCK_SIZE : end])
            key = hashlib.sha256(key + block).digest()
            self._prefix_of_key[key] = token_ids[:end]
            self._noted[request.order] = end, key

    def _check_may_share(self, request: Request) -> None:
        """Somebody who may share with it, or itself before, has had the tokens it found."""
        found = request.tokens_from(0, request.cached_len).tolist()
        assert request.cached_len < request.prefill_len
        others = (
            other
            for other in self.requests
            if other is not request or other.ready_after_step  # it was preempted
            if self._may_share(request, other)
        )
        assert any(
            [*other.prompt_ids.tolist(), *other.output_ids][: len(found)] == found
            for other in others
        ), f"request {request.order} found what nobody may share with it"

    def _may_share(self, one: Request, other: Request) -> bool:
        if one is other or (one.leader or one) is (other.leader or other):
            return True
        is_on = self.batch.limits.use_prefix_cache
        both = one.use_prefix_cache and other.use_prefix_cache
        return is_on and both and one.tenant == other.tenant


def run_history(seed: int, num_moves: int, use_prefix_cache: bool = True) -> History:
    """A history of that many moves, and on to its end."""
    draw = Random(seed)
    history = History(seed, use_prefix_cache)
    for _ in range(num_moves):
        history.move(draw.choice(MOVES), draw)
    history.finish(draw)
    return history
