"""`lockstep bench NAME ...` or `python -m bench NAME ...`."""

from __future__ import annotations

import importlib
import sys

# Name -> (module with main(argv) -> exit code, what it measures).
_BENCHES = {
    "serving": ("bench.serving", "a server through its public API, case by case"),
    "record": ("bench.record_run", "every figure of a TP degree, in one go (needs GPUs)"),
    "cpu": ("bench.cpu_decode", "decoding on CPU against transformers' generate"),
    "multi-turn": ("bench.multi_turn", "what the prefix cache saves in conversations"),
    "overload": ("bench.overload", "ten times more than the server can take"),
    "control-plane": ("bench.control_plane", "the coordinator, with simulated workers"),
    "first-token": ("bench.first_token", "the way of a first token, with simulated workers"),
    "streams": ("bench.frontend_streams", "what a token costs a frontend process"),
    "trace": ("bench.step_trace", "which kernels a decode step spends its time in (needs a GPU)"),
    "kernels": ("bench.bench_kernels", "every CUDA kernel against its floor (needs a GPU)"),
}


def main(argv: list[str]) -> int:
    """Runs the named benchmark; its module is imported only then."""
    if argv and argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if not argv or argv[0] not in _BENCHES:
        named = f"lockstep bench: no benchmark {argv[0]!r}\n" if argv else ""
        print(f"{named}{_usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(_BENCHES[argv[0]][0])
    return int(module.main(argv[1:]))


def _usage() -> str:
    lines = [f"  {name:<13} {text}" for name, (_, text) in _BENCHES.items()]
    return "\n".join(["usage: lockstep bench NAME ... (each has --help)", *lines])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
