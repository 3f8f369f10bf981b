"""Hosts that share nothing but a cable: network and process namespaces of this machine.

Root only. Two hosts on one private network, each with an address of its own, and a second cable
from host 0 to this process, for clients.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Self

# 198.18.0.0/15 is for tests between networks (RFC 2544) and routed nowhere.
ADDRESSES = ("198.18.1.1", "198.18.1.2")
CLIENT_SIDE, PUBLIC = "198.18.2.1", "198.18.2.2"
_LIMIT_S = 20


class NetworkHosts:
    """Makes the hosts on entry; removes them, with every process in them, on exit."""

    def __init__(self) -> None:
        self._names = [f"lockstep-{os.getpid()}-{index}" for index in range(2)]
        # Names of interfaces hold at most 15 characters.
        self._cables = [f"ls{os.getpid() % 10**7}{end}" for end in "abcd"]

    def command(self, host: int, words: Sequence[str]) -> list[str]:
        """`words` run on that host, where no process of another can be seen or signalled."""
        unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        return ["ip", "netns", "exec", self._names[host], *unshare, *words]

    def cut(self) -> None:
        """Takes the cable between the hosts out, at host 1. No connection is closed by that."""
        run("ip", "-n", self._names[1], "link", "set", self._cables[1], "down")

    def heal(self) -> None:
        """Puts it back."""
        run("ip", "-n", self._names[1], "link", "set", self._cables[1], "up")

    def __enter__(self) -> Self:
        assert os.geteuid() == 0, "only root may make network namespaces"
        between = list(zip(self._names, self._cables[:2], ADDRESSES, strict=True))
        try:
            for name in self._names:
                run("ip", "netns", "add", name)
                run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "link", "add", self._cables[0], "type", "veth", "peer", self._cables[1])
            for name, cable, address in between:
                self._plug(name, cable, address)
            run("ip", "link", "add", self._cables[2], "type", "veth", "peer", self._cables[3])
            self._plug(self._names[0], self._cables[3], PUBLIC)
            run("ip", "address", "add", f"{CLIENT_SIDE}/30", "dev", self._cables[2])
            run("ip", "link", "set", self._cables[2], "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _plug(self, name: str, cable: str, address: str) -> None:
        run("ip", "link", "set", cable, "netns", name)
        run("ip", "-n", name, "address", "add", f"{address}/30", "dev", cable)
        run("ip", "-n", name, "link", "set", cable, "up")

    def _remove(self) -> None:
        """Cables first: a namespace lives on while a connection in it waits for its other end, and
        would go on answering at our addresses."""
        first = self._names[0]
        for words in (
            ("ip", "link", "del", self._cables[2]),
            ("ip", "-n", first, "link", "del", self._cables[0]),
            *(("ip", "netns", "del", name) for name in self._names),
        ):
            # What is not there any more is what is wanted.
            subprocess.run(words, capture_output=True, timeout=_LIMIT_S, check=False)


def run(*words: str) -> None:
    """Runs a command; AssertionError with what it said if it fails."""
    ran = subprocess.run(words, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    assert ran.returncode == 0, (words, ran.stderr)
