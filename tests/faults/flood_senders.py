"""The kinds of floods, and the processes that send them: requests as fast as the connections allow."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Self
from uuid import uuid4

from tests.support.machine import SOURCE

# Connections of each process, each from its own address.
CONNECTIONS: Final = 8
# The peer that is trusted to set X-Forwarded-For.
PROXY: Final = "127.0.0.9"
_WRONG: Final = "a-guess-at-the-token-that-is-wrong"
_FIRST_ADDRESS: Final = 10  # the last number of the first address


@dataclass(frozen=True, kw_only=True, slots=True)
class FloodTarget:
    """The target of a flood. `body`: a message to the destination; `query`: a query to it."""

    port: int
    destination: str
    token: str = field(repr=False)
    body: bytes = field(repr=False)
    query: bytes = field(repr=False)
    forwarded: bool = False


def _post(
    target: FloodTarget,
    body: bytes,
    *,
    token: str | None = None,
    path: str | None = None,
    method: str = "POST",
    media: str = "application/json",
    **headers: str,
) -> bytes:
    given = {
        "host": "receiver.test",
        "content-type": media,
        "content-length": str(len(body)),
        "verification-token": target.token if token is None else token,
        **headers,
    }
    if target.forwarded:
        given["x-forwarded-for"] = f"2001:db8:{uuid4().hex[:4]}:{uuid4().hex[:4]}::1"
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"{method} {path or f'/redox/{target.destination}'} HTTP/1.1\r\n{head}\r\n".encode() + body


def _handshake(target: FloodTarget, token: str) -> bytes:
    return _post(target, json.dumps({"verification-token": token, "challenge": str(uuid4())}).encode(), token=token)


def renewed(body: bytes) -> bytes:
    """Return the message with another log id: a new message."""
    meta = json.loads(body)
    meta["Meta"]["Logs"] = [{"ID": str(uuid4()), "AttemptID": str(uuid4())}]
    return json.dumps(meta).encode()


GUESSES: Final = "guesses at the token endpoint"
MADE_UP: Final = "made-up sources"
NEW: Final = "new messages"
# Name → a function that makes a request of that flood, and the correct statuses for it.
KINDS: Final[dict[str, tuple[Callable[[FloodTarget], bytes], frozenset[int]]]] = {
    "wrong tokens": (lambda target: _post(target, target.body, token=_WRONG), frozenset({401})),
    "wrong tokens, each from another IPv6 /64": (
        lambda target: _post(target, target.body, token=_WRONG),
        frozenset({401}),
    ),
    "handshakes, wrong token": (lambda target: _handshake(target, _WRONG), frozenset({401})),
    "handshakes, right token": (lambda target: _handshake(target, target.token), frozenset({200})),
    "repeats of one message": (lambda target: _post(target, target.body), frozenset({200})),
    MADE_UP: (
        lambda target: _post(target, target.body.replace(SOURCE.encode(), str(uuid4()).encode())),
        frozenset({403}),
    ),
    "unknown destinations": (
        lambda target: _post(target, target.body, path="/redox/nobody-registered-this"),
        frozenset({401}),
    ),
    "another method": (lambda target: _post(target, target.body, method="PUT"), frozenset({405})),
    "invalid HTTP": (lambda _: b"GET /redox/lab HTTP/9.9\r\nbad\x00header\r\n\r\n", frozenset({400})),
    "queries without a responder": (lambda target: _post(target, renewed(target.query)), frozenset({501})),
    GUESSES: (
        lambda target: _post(
            target,
            b"grant_type=client_credentials&client_id=redox&client_secret=" + uuid4().hex.encode(),
            path=f"/oauth/{target.destination}/token",
            media="application/x-www-form-urlencoded",
        ),
        frozenset({401, 429}),
    ),
    NEW: (lambda target: _post(target, renewed(target.body)), frozenset({200})),
}
FORWARDED: Final = "wrong tokens, each from another IPv6 /64"
# Floods that leave no audit row, and the flood that leaves a row for each message that is kept.
NO_ROWS: Final = frozenset({"another method", "invalid HTTP"})
KEPT: Final = "queries without a responder"


def flood(kind: str, target: FloodTarget, number: int, seconds: float, limit: int) -> Counter[int]:
    """Send requests of that kind, for `seconds` or up to `limit`, on several connections. Returns counts by status."""
    counts: Counter[int] = Counter()
    lock = threading.Lock()
    ends = time.monotonic() + seconds

    def run(place: int) -> None:
        address = PROXY if target.forwarded else f"127.0.0.{_FIRST_ADDRESS + number * CONNECTIONS + place}"
        found: Counter[int] = Counter()
        with _Sender(target.port, address) as sender:
            while time.monotonic() < ends and found.total() * CONNECTIONS < limit:
                found[sender.send(KINDS[kind][0](target))] += 1
        with lock:
            counts.update(found)

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 60)
    return counts


class _Sender:
    """A connection from that address. It reconnects after the server has closed it."""

    def __init__(self, port: int, address: str) -> None:
        self._port, self._address = port, address
        self._socket: socket.socket | None = None

    def send(self, request: bytes) -> int:
        """Send a request. Returns the status of the response, 0 without one."""
        try:
            if self._socket is None:
                self._socket = socket.create_connection(
                    ("127.0.0.1", self._port), timeout=30, source_address=(self._address, 0)
                )
            with suppress(BrokenPipeError, ConnectionResetError):  # the server may have responded already
                self._socket.sendall(request)
            head, _, body = self._read(b"").partition(b"\r\n\r\n")
            fields = head.decode("latin-1").lower().split("\r\n")
            length = next((int(each.partition(":")[2]) for each in fields if each.startswith("content-length:")), 0)
            while len(body) < length:
                body = self._more(body)
            if "connection: close" in fields:
                self._close()
            return int(head.split()[1])
        except (OSError, ValueError, IndexError):
            self._close()
            return 0

    def _read(self, data: bytes) -> bytes:
        while b"\r\n\r\n" not in data:
            data = self._more(data)
        return data

    def _more(self, data: bytes) -> bytes:
        assert self._socket is not None
        if not (more := self._socket.recv(65536)):
            raise ConnectionResetError
        return data + more

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
