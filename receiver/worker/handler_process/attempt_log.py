"""The log and the metrics of attempts that did not succeed: one line each, without the text of the error."""

from __future__ import annotations

from typing import Any, Final

import structlog

from receiver.metrics import counters
from receiver.states import DeliveryState
from receiver.worker.handler_process.ipc import Unsuccessful

delivery_log: Final = structlog.get_logger("receiver.delivery")


def log_attempt(message: Unsuccessful, handler: str, destination: str) -> None:
    """Log and count an attempt that did not succeed."""
    outcome = "dead" if message.state == DeliveryState.DEAD else "failed"
    counters.count_attempt(destination, handler, "deferred" if message.outcome == "retry_later" else outcome, None)
    details = {"sqlstate": message.sqlstate, "error": message.shown, "again_in": message.pause}
    line = {name: value for name, value in details.items() if value is not None}
    fields: dict[str, Any] = {
        "handler": handler,
        "destination": destination,
        "lane": message.lane,
        "delivery": message.delivery,
        "attempt": message.attempt,
        "outcome": message.outcome,
        "error_class": message.error_class,
        "frames": list(message.frames),
        **line,
    }
    if message.state == DeliveryState.DEAD:
        delivery_log.error("delivery.dead", **fields)
    elif message.outcome == "retry_later":
        delivery_log.info("delivery.deferred", **fields)
    else:
        delivery_log.warning("delivery.failed", **fields)
