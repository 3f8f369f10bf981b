"""Log lines on standard error, as text for people or JSON for machines."""

import json
import logging
import sys
import time

# What a line is about, where it is about one: given as `extra` where it is logged.
_FIELDS = ("request_id", "rank", "epoch", "step")


class _JsonFormatter(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(log_format: str, role: str) -> None:
    """Sends the root logger to standard error; `log_format` is "text" or "json".

    `role` is named in every line ("coordinator", "worker 3"). Called once, by a daemon's main.
    """
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(_JsonFormatter(role))
    else:
        layout = f"%(asctime)s.%(msecs)03d {role} %(levelname)s %(message)s"
        handler.setFormatter(logging.Formatter(layout, datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
