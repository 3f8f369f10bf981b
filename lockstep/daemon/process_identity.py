"""What tells a process from a later one with the same pid, also after a reboot."""

from pathlib import Path


def boot_id() -> str:
    """Identifies the running kernel (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def start_ticks(pid: int) -> int:
    """Start time of a process, field 22 of /proc/PID/stat (proc(5)); -1 if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return -1
    # The process name, field 2, may hold spaces and brackets.
    return int(stat.rpartition(")")[2].split()[19])
