"""From decisions to bytes: table deltas, the running digest, and commands serialised once."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from coordinator.request import Request
from coordinator.sampling_limits import MAX_BAD_WORD_IDS
from protos.lockstep.v1 import worker_pb2

_DIGEST_LEN = 8
_NUM_RECENT = MAX_BAD_WORD_IDS - 1  # as many as a bad word has before its last


@dataclass
class DeltaBuilder:
    """Collects the changes of one command; `build` packs them in the order of worker.proto."""

    opened: list[Request] = field(default_factory=list)
    block_appends: list[tuple[int, int, int]] = field(default_factory=list)
    limits: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[tuple[int, int, int]] = field(default_factory=list)
    chunk_token_ids: list[bytes] = field(default_factory=list)
    masks: list[worker_pb2.SlotMask] = field(default_factory=list)
    prompt_targets: list[tuple[int, int]] = field(default_factory=list)
    scored: list[tuple[Request, int, int]] = field(default_factory=list)  # see SentCommand

    def append_blocks(self, request: Request, block_ids: Sequence[int], block_size: int) -> None:
        """Gives a sequence more blocks and raises its limit to what they cover."""
        slot, held = request.slot, request.block_ids
        for block_id in block_ids:
            self.block_appends.append((slot, len(held), block_id))
            held.append(block_id)
        request.limit = min(len(held) * block_size, request.top_limit)
        self.limits.append((slot, request.limit))

    def open(self, request: Request, block_ids: Sequence[int], block_size: int) -> None:
        """Describes a sequence that has just got its slot, and perhaps cached blocks."""
        request.block_ids += block_ids
        request.limit = min(len(request.block_ids) * block_size, request.top_limit)
        self.opened.append(request)

    def add_chunk(self, request: Request, start: int, length: int) -> None:
        """Runs tokens start..start+length-1 of a sequence."""
        self.chunks.append((request.slot, start, length))
        tokens = request.tokens_from(start, length)
        self.chunk_token_ids.append(tokens.astype("<i4", copy=False).tobytes())
        if request.constraint is not None and start + length == request.prefill_len:
            self.masks.append(request.take_mask())
        if request.awaits_prompt_scores:
            self._add_targets(request, start, start + length)

    def _add_targets(self, request: Request, start: int, end: int) -> None:
        """Asks for the log-probabilities of what follows positions start..end-1 of a prompt."""
        num_scored = min(end, request.prompt_len - 1) - start
        if num_scored > 0:
            behind = int(request.prompt_ids[end]) if end < request.prompt_len else -1
            self.prompt_targets.append((request.slot, behind))
            self.scored.append((request, start, num_scored))

    def grant_masked(self, request: Request, block_size: int) -> None:
        """Lets a decoding sequence compute the position of the mask that it has got."""
        request.limit = min(len(request.block_ids) * block_size, request.top_limit)
        self.limits.append((request.slot, request.limit))
        self.masks.append(request.take_mask())

    def build(
        self, closed_slots: Sequence[int], row_changes: Sequence[tuple[int, int]], num_rows: int
    ) -> bytes:
        """The serialised TableDelta."""
        return worker_pb2.TableDelta(
            closed_slots=pack_int32(closed_slots),
            opened_slots=[slot_open(request) for request in self.opened],
            block_appends=pack_int32(self.block_appends),
            limits=pack_int32(self.limits),
            row_changes=pack_int32(row_changes),
            row_count=num_rows,
            chunks=pack_int32(self.chunks),
            chunk_token_ids=b"".join(self.chunk_token_ids),
            masks=self.masks,
            prompt_targets=pack_int32(self.prompt_targets),
        ).SerializeToString()


class CommandEncoder:
    """Numbers, chains and serialises the commands of one epoch."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._digest = bytes(_DIGEST_LEN)
        self.last_command_id = 0
        self.last_step = 0

    def encode(self, delta: bytes, num_steps: int, table_digest: bytes) -> bytes:
        """The next command as a serialised ExecuteRequest, the same bytes for every rank."""
        chained = hashlib.blake2b(self._digest + delta, digest_size=32)
        self._digest = chained.digest()[:_DIGEST_LEN]
        self.last_command_id += 1
        command = worker_pb2.StepCommand(
            command_id=self.last_command_id,
            epoch=self._epoch,
            first_step=self.last_step + 1,
            step_count=num_steps,
            delta=delta,
            digest=self._digest,
            table_digest=table_digest,
        )
        self.last_step += num_steps
        return worker_pb2.ExecuteRequest(command=command).SerializeToString()


def pack_int32(
    numbers: Sequence[int] | Sequence[tuple[int, ...]] | npt.NDArray[np.int32],
) -> bytes:
    """Little-endian int32 without framing; tuples one after another."""
    return np.array(numbers, dtype="<i4").tobytes() if len(numbers) else b""


def unpack_int32(packed: bytes) -> list[int]:
    """The numbers of `pack_int32`; ValueError if they are no whole number of int32."""
    unpacked: list[int] = np.frombuffer(packed, dtype="<i4").tolist()
    return unpacked


def recent_outputs(request: Request, prefill_len: int) -> bytes:
    """The last outputs below `prefill_len`, for sequences that must not end a bad word; packed."""
    if not request.sampling.bad_words:
        return b""
    num_outputs = prefill_len - request.prompt_len
    return pack_int32(request.output_ids[max(num_outputs - _NUM_RECENT, 0) : num_outputs])


def slot_open(request: Request) -> worker_pb2.SlotOpen:
    """A sequence as workers need to know it, with the blocks and the limit that it has now."""
    sampling = request.sampling
    cached = request.tokens_from(0, request.cached_len) if sampling.counts_tokens else ()
    return worker_pb2.SlotOpen(
        slot=request.slot,
        prompt_len=request.prompt_len,
        prefill_len=request.prefill_len,
        limit=request.limit,
        block_ids=pack_int32(request.block_ids),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        # Masks heed it, where they can; the ranks could leave nothing to choose.
        min_tokens=sampling.min_tokens if request.constraint is None else 0,
        stop_ids=pack_int32(sampling.stop_ids),
        logprob_count=sampling.num_logprobs,
        cached_len=request.cached_len,
        cached_token_ids=pack_int32(cached),
        bias_ids=pack_int32([token_id for token_id, _ in sampling.logit_bias]),
        bias_values=np.array([value for _, value in sampling.logit_bias], "<f4").tobytes(),
        bad_words=[pack_int32(word) for word in sampling.bad_words],
        recent_output_ids=recent_outputs(request, request.prefill_len),
        is_constrained=request.constraint is not None,
    )
