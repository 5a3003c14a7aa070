"""The load. In a closed loop each connection sends its next request after an answer (wrk). In an open loop requests
leave at a fixed rate, and each is measured from when it should have left: a server that stalls does not get fewer
requests.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

from receiver.simulator.signer import Signer
from tests.bench.bodies import Body, Ids, signatures

_LUA: Final = Path(__file__).with_name("wrk.lua")
# Signatures are computed in advance, for more requests and bytes than any receiver takes in a second.
_SIGNED: Final = 8_000
_SIGNED_BYTES: Final = 250_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """The result of a load. `cut` requests had no answer when it ended. Latencies in seconds."""

    answered: int
    cut: int
    wrong: int  # answered with another status than 2xx
    broken: int  # not answered: refused, reset, timed out
    seconds: float
    p50: float
    p99: float

    @property
    def rate(self) -> float:
        """The answers a second."""
        return self.answered / self.seconds


def closed_loop(
    url: str, body: Body, headers: Mapping[str, str], *, connections: int, seconds: float, signed: bytes | None = None
) -> Sent:
    """Send for `seconds`. `signed`: the webhook signing secret, to add a signature."""
    ids = Ids()
    with tempfile.TemporaryDirectory() as directory:
        head, template = Path(directory, "head"), Path(directory, "body")
        lines = {"Content-Type": "application/json", **headers}
        command = [str(head), str(template), ids.prefix]
        if signed is not None:
            lines[Signer(secret=b"").header] = "@SIGNATURE@"
            count = math.ceil(seconds * min(_SIGNED, _SIGNED_BYTES / len(body.template))) + connections
            made = Path(directory, "signatures")
            made.write_text("\n".join(signatures(body, signed, ids, count)))
            command.append(str(made))
        head.write_text("".join(f"{name}: {value}\r\n" for name, value in lines.items()))
        template.write_bytes(body.template)
        done = subprocess.run(
            [
                "wrk",
                "-t",
                "1",
                "-c",
                str(connections),
                "-d",
                f"{math.ceil(seconds)}s",
                "--timeout",
                "30s",
                "-s",
                str(_LUA),
                url,
                "--",
                *command,
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds + 120,
        )
    try:
        output = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        raise RuntimeError(f"wrk: {done.stdout} {done.stderr}") from None
    if output["unsigned"]:
        raise RuntimeError("more requests than signatures")
    return Sent(
        answered=output["answered"],
        cut=max(0, output["issued"] - output["answered"]),
        wrong=output["refused"],
        broken=output["broken"],
        seconds=output["seconds"],
        p50=output["p50"] / 1e6,
        p99=output["p99"] / 1e6,
    )


def once(url: str, body: Body, headers: Mapping[str, str], *, signed: bytes | None = None) -> int | None:
    """Send one message, and return the status of the answer, None if there was no answer."""
    message = body.with_id(str(uuid4()))
    address = urlsplit(url)
    signature = {} if signed is None else Signer(secret=signed).headers(message, now=0)
    connection = HTTPConnection(address.netloc, timeout=60)
    try:
        connection.request("POST", address.path, message, {"Content-Type": "application/json", **headers, **signature})
        return connection.getresponse().status
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()


def open_loop(
    url: str, body: Body, headers: Mapping[str, str], *, rate: float, seconds: float, connections: int = 64
) -> Sent:
    """Send `rate` messages a second for `seconds`, and wait for every answer."""
    return asyncio.run(_open_loop(url, body, headers, round(rate * seconds), rate, connections))


async def _open_loop(
    url: str, body: Body, headers: Mapping[str, str], count: int, rate: float, connections: int
) -> Sent:
    loop = asyncio.get_running_loop()
    address = urlsplit(url)
    lines = [
        f"POST {address.path} HTTP/1.1",
        f"Host: {address.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(body.template)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    head = "\r\n".join([*lines, "", ""])
    requests = (head.encode() + body.with_id(each) for _, each in zip(range(count), Ids(), strict=False))
    line = _Line(
        count, connections, lambda made: loop.create_connection(made, str(address.hostname), address.port or 80)
    )
    await line.open()
    began = loop.time() + 0.05
    for number, request in enumerate(requests):
        due = began + number / rate
        if (early := due - loop.time()) > 0:
            await asyncio.sleep(early)
        line.send(due, request)
    try:
        async with asyncio.timeout(60):
            await line.finished.wait()
    except TimeoutError:
        pass  # requests without an answer by now count as broken
    ended = loop.time()
    line.close()
    answered = len(line.latencies)
    return Sent(
        answered=answered,
        cut=0,
        wrong=line.wrong,
        broken=count - answered,
        seconds=ended - began,
        p50=quantile(line.latencies, 0.5),
        p99=quantile(line.latencies, 0.99),
    )


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which that share of the values lies, NaN without values."""
    if len(values) < 2:
        return values[0] if values else math.nan
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


class _Line:
    """Requests that wait for a connection, connections that wait for a request, and the latencies so far.

    A connection is made when there is none for a request, as clients do: one that never says anything may cost a server
    a thread. At most `connections`; `connect` makes one.
    """

    def __init__(
        self, count: int, connections: int, connect: Callable[[Callable[[], _Connection]], Coroutine[Any, Any, object]]
    ) -> None:
        self.latencies: list[float] = []
        self.wrong = 0
        self.finished = asyncio.Event()
        self._left = count
        self._most = connections
        self._connect = connect
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._all: list[_Connection] = []
        self._idle: list[_Connection] = []
        self._opening: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Make a connection. Raises OSError."""
        await self._connect(lambda: _Connection(self))

    def close(self) -> None:
        """Hang up."""
        for task in self._opening:
            task.cancel()
        for connection in self._all:
            connection.close()

    def send(self, due: float, request: bytes) -> None:
        """Send it now, or as soon as a connection is free."""
        if self._idle:
            self._idle.pop().send(due, request)
            return
        self._waiting.append((due, request))
        if len(self._all) + len(self._opening) < self._most:
            task = asyncio.create_task(self._open_another())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open_another(self) -> None:
        with suppress(OSError):  # the request waits for an existing connection
            await self.open()

    def made(self, connection: _Connection) -> None:
        """A connection is there."""
        self._all.append(connection)
        self.free(connection)

    def free(self, connection: _Connection) -> None:
        """That connection may send."""
        if self._waiting:
            connection.send(*self._waiting.popleft())
        else:
            self._idle.append(connection)

    def answered(self, latency: float, *, well: bool) -> None:
        """An answer is there."""
        self.latencies.append(latency)
        self.wrong += not well
        self.ended()

    def ended(self) -> None:
        """A request has ended, whichever way."""
        self._left -= 1
        if not self._left:
            self.finished.set()

    def lost(self, connection: _Connection) -> None:
        """A connection is gone."""
        self._all.remove(connection)
        if connection in self._idle:
            self._idle.remove(connection)


class _Connection(asyncio.Protocol):
    """One connection, one request at a time. Answers have a Content-Length, as all measured ones do."""

    def __init__(self, line: _Line) -> None:
        self._line = line
        self._due: float | None = None
        self._got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._line.made(self)

    def close(self) -> None:
        """Hang up."""
        self._transport.close()

    def send(self, due: float, request: bytes) -> None:
        """Send a request that should have left at `due`."""
        self._due = due
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, end, rest = self._got.partition(b"\r\n\r\n")
        if not end or len(rest) < _length(head) or self._due is None:
            return
        latency = asyncio.get_running_loop().time() - self._due
        self._due, self._got = None, b""
        self._line.answered(latency, well=head[9:10] == b"2")
        self._line.free(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._line.lost(self)
        if self._due is not None:
            self._due = None
            self._line.ended()


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    return 0
