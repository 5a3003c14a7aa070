"""The handler that is subscribed while the receiver is measured: every message gets a delivery."""

from __future__ import annotations

from receiver.handlers import Context, Message, handler


@handler("*", name="idle")
def idle(message: Message, context: Context) -> None:
    """Do nothing: the cost of handling is not measured here."""
