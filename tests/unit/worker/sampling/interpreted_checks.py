"""Runs the sampling kernels under Triton's interpreter; started by test_triton_kernels.py.

A program of its own because TRITON_INTERPRET=1 must be set before Triton is imported.
"""

from __future__ import annotations

import torch

from tests.helpers.sampling_kernel_checks import check_all
from tests.unit.worker.kernels.interpreted_sweep import allow_numpy_2_4


def main() -> None:
    allow_numpy_2_4()
    torch.set_num_threads(1)
    check_all(torch.device("cpu"))


if __name__ == "__main__":
    main()
