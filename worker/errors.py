"""What can go wrong in a worker because of the world (our own bugs are assertions).

WorkerError
  UnsupportedModel   config.json asks for arithmetic that is not implemented, or for a split
                     that is not possible
  CheckpointError    the weight files do not hold what config.json promises
  CommandRefused     a step command is not the next one, or makes no sense
  PhaseError         a start-up phase was asked for out of order or with another epoch
  DeviceError        the device is missing, too small or not what was asked for
"""

from __future__ import annotations


class WorkerError(Exception):
    """Base of every error that a worker raises on purpose."""


class UnsupportedModel(WorkerError):
    """The model cannot be run faithfully; the message names the key, its value and the remedy."""


class CheckpointError(WorkerError):
    """A weight file is missing, cut short or different; names file, tensor, expected, found."""


class CommandRefused(WorkerError):
    """A step command must not run; the message names the coordinator's view and ours."""


class PhaseError(WorkerError):
    """A phase was asked for out of order or under another epoch; names both."""


class DeviceError(WorkerError):
    """The device is missing or too small; names what was asked, what is there and the remedy."""
