"""A handler that does nothing."""

from __future__ import annotations

from receiver.handlers import Context, Message, handler


@handler("*", name="plain")
def plain(message: Message, context: Context) -> None:
    """Does nothing."""
