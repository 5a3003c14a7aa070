"""A handler that lets nothing go: each message costs a descriptor. Whoever watches must find it."""

from __future__ import annotations

import os

from receiver.handlers import Context, Message, handler


@handler("*", name="hoard", ordering="none", timeout=60)
def hoard(message: Message, context: Context) -> None:
    """Open, and never close."""
    os.open(os.devnull, os.O_RDONLY)
