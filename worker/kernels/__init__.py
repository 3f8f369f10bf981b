"""One operation a file: its plain torch reference, its Triton kernel and its launcher.

The references are the CPU backend and what the kernels are tested against; `worker.ops` picks.
"""
