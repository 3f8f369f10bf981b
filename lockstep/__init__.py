"""Lockstep's command line and Python client: thin, and never a home for the daemons' logic."""

from lockstep.daemon.version import __version__

__all__ = ["__version__"]
