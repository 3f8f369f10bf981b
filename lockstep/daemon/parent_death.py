"""Dying with the parent, so that a killed supervisor leaves no process behind."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_pid: int, death_signal: int = signal.SIGKILL) -> None:
    """Asks the kernel to send this process `death_signal` when its parent thread ends.

    Called first thing in a child. `parent_pid` closes the race: if the parent is gone already, this
    process ends at once. The signal follows the parent's *thread*, so children are started from a
    thread that lives as long as the parent (prctl(2)).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != parent_pid:
        os._exit(128 + death_signal)
