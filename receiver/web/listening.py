"""The addresses on which this process listens, as its server reports them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_addresses: list[str] = []


def note(sockets: Iterable[Any]) -> None:
    """Keep the addresses of listening sockets: HOST:PORT, [HOST]:PORT, or the path of a Unix socket."""
    _addresses[:] = [_text(each.getsockname()) for each in sockets]


def address(default: str) -> str:
    """The addresses, separated by commas; `default` if the server has reported none."""
    return ", ".join(_addresses) or default


def _text(name: Any) -> str:
    if not isinstance(name, tuple):
        return name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    host, port = name[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
