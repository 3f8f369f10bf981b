"""What can go wrong on the outside of the product. Each message is one line and says what to do."""


class LockstepError(Exception):
    """Base of everything this package raises on purpose."""


class DemoModelError(LockstepError):
    """The demo model could not be fetched, converted or found."""


class HubError(LockstepError):
    """A model could not be resolved or fetched from a model hub."""


class ConfigError(LockstepError):
    """The settings of a command do not fit together or this host."""


class AddressInUse(LockstepError):
    """Something else listens where this was told to."""


class CallFailed(LockstepError):
    """The server ended a call with a status; `code` is its name, "UNAVAILABLE" for example."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
