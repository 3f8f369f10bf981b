"""A SlotOpen as the tables and the sampler need it, each number checked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from protos.lockstep.v1 import worker_pb2
from worker.errors import CommandRefused
from worker.sampling_params import MAX_STOP_IDS, SlotParams

Int32Array = npt.NDArray[np.int32]
UInt8Array = npt.NDArray[np.uint8]


def slot_params(opening: worker_pb2.SlotOpen) -> SlotParams:
    """The sampler's view of a sequence; raises CommandRefused naming what is out of range."""
    if len(opening.stop_ids) > 4 * MAX_STOP_IDS:
        raise CommandRefused(f"slot {opening.slot} has more than {MAX_STOP_IDS} stop ids")
    try:
        return SlotParams(
            temperature=opening.temperature,
            top_k=opening.top_k,
            top_p=opening.top_p,
            min_p=opening.min_p,
            seed=opening.seed & (2**64 - 1),
            repetition_penalty=opening.repetition_penalty,
            presence_penalty=opening.presence_penalty,
            frequency_penalty=opening.frequency_penalty,
            prompt_len=opening.prompt_len,
            min_tokens=opening.min_tokens,
            stop_ids=tuple(unpack_int32(opening.stop_ids, 1, "stop_ids")[:, 0].tolist()),
            num_logprobs=None if opening.logprob_count < 0 else opening.logprob_count,
            logit_bias=_logit_bias(opening),
            bad_words=tuple(
                tuple(unpack_int32(word, 1, "bad_words")[:, 0].tolist())
                for word in opening.bad_words
            ),
            recent_ids=tuple(
                unpack_int32(opening.recent_output_ids, 1, "recent_output_ids")[:, 0].tolist()
            ),
            is_constrained=opening.is_constrained,
        )
    except ValueError as error:
        raise CommandRefused(f"slot {opening.slot}: {error}") from None


def _logit_bias(opening: worker_pb2.SlotOpen) -> tuple[tuple[int, float], ...]:
    ids = unpack_int32(opening.bias_ids, 1, "bias_ids")[:, 0].tolist()
    if len(opening.bias_values) != 4 * len(ids):
        raise CommandRefused(
            f"slot {opening.slot}: bias_values has {len(opening.bias_values)} bytes for"
            f" {len(ids)} bias_ids"
        )
    return tuple(zip(ids, np.frombuffer(opening.bias_values, "<f4").tolist(), strict=True))


def allowed_bits(mask: worker_pb2.SlotMask, vocab_size: int) -> UInt8Array:
    """uint8 [(vocab_size + 7) // 8], bit i % 8 of byte i // 8 for id i; CommandRefused."""
    match mask.WhichOneof("allowed"):
        case "ids":
            ids = unpack_int32(mask.ids, 1, "masks.ids")[:, 0]
            if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise CommandRefused(f"slot {mask.slot}: a mask's id is not in 0..{vocab_size - 1}")
            is_allowed = np.zeros(vocab_size, np.bool_)
            is_allowed[ids] = True
            return np.packbits(is_allowed, bitorder="little")
        case "bits":
            bits = np.frombuffer(mask.bits, np.uint8)
            if len(bits) != (vocab_size + 7) // 8 or (
                vocab_size % 8 and bits[-1] >> vocab_size % 8
            ):
                raise CommandRefused(
                    f"slot {mask.slot}: a mask of {len(bits)} bytes is not one of {vocab_size} bits"
                )
            return bits
    raise CommandRefused(f"slot {mask.slot}: a mask names no ids")


def check_lengths(opening: worker_pb2.SlotOpen, num_blocks: int, block_size: int) -> None:
    """prompt_len, prefill_len and cached_len fit together and the blocks; CommandRefused if not."""
    slot, cached = opening.slot, opening.cached_len
    if not 1 <= opening.prompt_len <= opening.prefill_len:
        raise CommandRefused(
            f"slot {slot}: prompt_len {opening.prompt_len} and prefill_len"
            f" {opening.prefill_len} do not fit together"
        )
    if not 0 <= cached < opening.prefill_len or cached % block_size:
        raise CommandRefused(
            f"slot {slot}: cached_len {cached} is not a multiple of block_size {block_size} from 0"
            f" to below prefill_len {opening.prefill_len}"
        )
    if cached > num_blocks * block_size:
        raise CommandRefused(
            f"slot {slot}: cached_len {cached} is above {num_blocks * block_size}, the positions"
            " its blocks cover"
        )


def cached_token_ids(
    opening: worker_pb2.SlotOpen, params: SlotParams, vocab_size: int
) -> Int32Array:
    """int32 [cached_len] for a sequence whose penalties count tokens, else [0]; CommandRefused."""
    token_ids = unpack_int32(opening.cached_token_ids, 1, "cached_token_ids")[:, 0]
    wanted = opening.cached_len if params.counts_tokens else 0
    if len(token_ids) != wanted:
        raise CommandRefused(
            f"slot {opening.slot}: {len(token_ids)} cached_token_ids came; its cached_len"
            f" {opening.cached_len} and penalties want {wanted}"
        )
    if wanted and not 0 <= token_ids.min() <= token_ids.max() < vocab_size:
        raise CommandRefused(
            f"slot {opening.slot}: a cached token id is not in 0..{vocab_size - 1}"
        )
    return token_ids


def unpack_int32(packed: bytes, width: int, name: str) -> Int32Array:
    """int32 [n, width] view of packed little-endian numbers; CommandRefused on a bad size."""
    if len(packed) % (4 * width):
        raise CommandRefused(f"{name} has {len(packed)} bytes, not a multiple of {4 * width}")
    return np.frombuffer(packed, "<i4").reshape(-1, width)
