"""Where a call's time went, as trailing metadata: keys and units are in docs/protocol.md."""

from protos.lockstep.v1 import engine_pb2

Metadata = tuple[tuple[str, str], ...]


def frontend_metadata(frontend_seconds: float) -> Metadata:
    """What the frontend knows by itself: time to check and tokenise."""
    return (("lockstep-frontend-ms", _milliseconds(frontend_seconds)),)


def times_metadata(times: engine_pb2.RequestTimes) -> Metadata:
    """What the engine says; a share that was not measured is left out."""
    comm_share: Metadata = ()
    if times.comm_share >= 0:
        comm_share = (("lockstep-comm-share", f"{times.comm_share:.4f}"),)
    return (
        ("lockstep-queue-ms", _milliseconds(times.queue_seconds)),
        ("lockstep-prefill-ms", _milliseconds(times.prefill_seconds)),
        ("lockstep-decode-ms", _milliseconds(times.decode_seconds)),
        *comm_share,
        ("lockstep-steps", str(times.step_count)),
        ("lockstep-preemptions", str(times.preemption_count)),
        ("lockstep-cached-tokens", str(times.cached_token_count)),
        ("lockstep-epoch", str(times.epoch)),
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3f}"
