"""Exit codes of every lockstep process."""

import enum


class ExitCode(enum.IntEnum):
    """What an exit says to a supervisor; anything else is a crash."""

    CLEAN = 0
    CONFIG = 2
    CHECKPOINT = 3
    DEVICE = 4  # GPU, NCCL, shared memory
    ADDRESS = 5  # a port is in use or not ours to bind
    GROUP_LOST = 6  # ranks were lost too often, or this worker was told to go
    SECOND_SIGNAL = 130
