"""The ranks' tables as the step log keeps them at the start of a segment."""

from coordinator.batch import Batch
from coordinator.request import Request
from coordinator.step_command import pack_int32, recent_outputs, slot_open
from protos.lockstep.v1 import step_log_pb2


def snapshot_tables(batch: Batch) -> step_log_pb2.StepLogSnapshot:
    """What to rebuild so that the next command finds what it will find on the ranks.

    Exact only right after a command without steps and with nothing unreported: then the engine's
    tables are those of the ranks, and every token that was sampled is in its request's record.
    """
    assert not batch.num_unreported, "tokens are still on their way"
    return step_log_pb2.StepLogSnapshot(
        command_id=batch.last_command_id,
        step=batch.last_step,
        slots=[_slot(batch.slots.open[slot]) for slot in sorted(batch.slots.open)],
        row_slots=pack_int32([request.slot for request in batch.rows.requests]),
    )


def _slot(request: Request) -> step_log_pb2.StepLogSlot:
    is_prefilled = request.num_prefilled == request.prefill_len
    num_known = request.num_to_prefill if is_prefilled else request.num_prefilled
    tokens = request.tokens_from(0, num_known)
    opening = slot_open(request)
    # A replay finds empty blocks: it prefills shared ones once more for each who shares them.
    opening.cached_len = 0
    opening.cached_token_ids = b""
    if is_prefilled:  # and samples its last token again
        opening.recent_output_ids = recent_outputs(request, num_known - 1)
    return step_log_pb2.StepLogSlot(
        open=opening,
        prefilled_count=request.num_prefilled,
        token_ids=tokens.astype("<i4", copy=False).tobytes(),
        mask=request.sent_mask,
    )
