"""A handler with a leak: each message costs a file descriptor. The soak test must find it."""

from __future__ import annotations

import os

from receiver.handlers import Context, Message, handler


@handler("*", name="hoard", ordering="none", timeout=60)
def hoard(message: Message, context: Context) -> None:
    """Open a file, and never close it."""
    os.open(os.devnull, os.O_RDONLY)
