"""A TCP proxy in front of PostgreSQL that fails on command: slow, cut, reset, frozen, or with answers held or dropped.

Must not change a byte. Client and server are real.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import make_url

# ReadyForQuery, idle: the server has done what was asked, and committed it (PostgreSQL: Message Formats).
_READY = b"Z\x00\x00\x00\x05I"
_CHUNK = 65536


class HeldAnswer:
    """The answer to one request, held back. `committed` is set once the server has sent all of it."""

    def __init__(self, marker: bytes) -> None:
        self._marker = marker
        self._released = threading.Event()
        self.committed = threading.Event()

    def is_in(self, data: bytes) -> bool:
        """Return whether this is the request."""
        return self._marker in data

    def hold(self, answer: bytes) -> bool:
        """Hold the answer once it is complete, until `release`. Return False while there is more of it to come."""
        if not answer.endswith(_READY):
            return False
        self.committed.set()
        self._released.wait()
        return True

    def release(self) -> None:
        """Send the answer on. If the connection is gone, nobody receives it."""
        self._released.set()


class _Pair:
    """A client's connection, ours to the server, and the number of our threads that still forward between them."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.held: HeldAnswer | None = None
        self.forwarding = 2
        self._reset = False

    def end(self, *, reset: bool = False) -> None:
        """End both connections, which wakes their readers. With `reset` the client receives RST."""
        self._reset |= reset
        with suppress(OSError):
            if reset:
                # Closed without lingering it is reset; a shutdown for writing would have sent FIN first.
                self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.client.shutdown(socket.SHUT_RD)
                self.client.close()
            elif not self._reset:
                self.client.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close both: no thread forwards any more."""
        self.client.close()
        self.server.close()


class TcpProxy:
    """Listens on a port of 127.0.0.1 and connects each client to the server through `connect`.

    `greet`: what happens to a client's connection first, for example a TLS handshake; returns the connection to use.
    """

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        *,
        greet: Callable[[socket.socket], socket.socket] = lambda client: client,
    ) -> None:
        self._connect = connect
        self._greet = greet
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.delay = 0.0  # seconds, for each chunk
        # Drop what the server sends from now on; with `drop_after_greeting`, from the moment it takes commands.
        self.drop_answers = False
        self.drop_after_greeting = False
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._pairs: list[_Pair] = []
        self._held: list[HeldAnswer] = []
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._acceptor.start()

    def url(self, direct: str) -> str:
        """Return the database URL `direct` with this proxy's address."""
        return make_url(direct).set(host="127.0.0.1", port=self.port, query={}).render_as_string(hide_password=False)

    def hold_answer(self, marker: bytes) -> HeldAnswer:
        """Hold the answer to the next request that contains these bytes: the server has done it, the client waits."""
        held = HeldAnswer(marker)
        with self._lock:
            self._held.append(held)
        return held

    def freeze(self) -> None:
        """Deliver nothing either way from now on, with no error. New connections hang too."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Deliver what was on its way, and go on."""
        self._flowing.set()

    def cut(self, *, reset: bool = False) -> int:
        """End every connection, by FIN or RST, and return their number. New connections are accepted."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            pair.end(reset=reset)
            if pair.held is not None:
                pair.held.release()
        return len(pairs)

    def close(self) -> None:
        """End everything."""
        for held in self._held:
            held.release()
        self.thaw()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            # While the server is away, a client is accepted and then closed, as behind a load balancer.
            try:
                client = self._greet(client)
                server = self._connect()
            except OSError:
                client.close()
                continue
            pair = _Pair(client, server)
            with self._lock:
                self._pairs.append(pair)
                self._threads = [thread for thread in self._threads if thread.is_alive()]
                for run in (self._forward_requests, self._forward_answers):
                    self._threads.append(threading.Thread(target=self._run, args=(run, pair), daemon=True))
            for thread in self._threads[-2:]:
                thread.start()

    def _run(self, run: Callable[[_Pair], None], pair: _Pair) -> None:
        with suppress(OSError):
            run(pair)
        pair.end()
        with self._lock:
            if pair in self._pairs:
                self._pairs.remove(pair)
            pair.forwarding -= 1
            last = pair.forwarding == 0
        if last:
            pair.close()

    def _forward_requests(self, pair: _Pair) -> None:
        before = b""
        while data := pair.client.recv(_CHUNK):
            self._wait_for_flow()
            with self._lock:
                for held in self._held:
                    if held.is_in(before + data):
                        pair.held = held
                        self._held.remove(held)
                        break
            before = data[-64:]
            pair.server.sendall(data)

    def _forward_answers(self, pair: _Pair) -> None:
        answer = b""
        greeted = False
        while data := pair.server.recv(_CHUNK):
            self._wait_for_flow()
            if self.drop_answers or (greeted and self.drop_after_greeting):
                continue
            greeted |= data.endswith(_READY)
            answer += data
            if pair.held is not None:
                if not pair.held.hold(answer):
                    continue
                pair.held = None
            pair.client.sendall(answer)
            answer = b""

    def _wait_for_flow(self) -> None:
        if self.delay:
            time.sleep(self.delay)
        self._flowing.wait()


@contextmanager
def tcp_proxy(
    connect: Callable[[], socket.socket], *, greet: Callable[[socket.socket], socket.socket] = lambda client: client
) -> Iterator[TcpProxy]:
    """Run a proxy while the block runs."""
    made = TcpProxy(connect, greet=greet)
    try:
        yield made
    finally:
        made.close()


def connect_to(url: str) -> socket.socket:
    """Connect to the PostgreSQL that listens on the Unix socket of a database URL."""
    address = make_url(url).query
    made = socket.socket(socket.AF_UNIX)
    try:
        made.connect(str(Path(str(address["host"])) / f".s.PGSQL.{address['port']}"))
    except OSError:
        made.close()
        raise
    return made
