"""A TCP proxy in front of PostgreSQL that can fail: delay, cut, reset, freeze, or hold one reply back.

Both sides are real. Must not change a byte.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# ReadyForQuery, idle: the request is done and committed (PostgreSQL: message formats).
_READY = b"Z\x00\x00\x00\x05I"
_PIECE = 65536


class Held:
    """The reply to one request, held back. `committed`: set once the server has sent all of the reply."""

    def __init__(self, marker: bytes) -> None:
        self._marker = marker
        self._going = threading.Event()
        self.committed = threading.Event()

    def is_in(self, data: bytes) -> bool:
        """Return whether this is the request."""
        return self._marker in data

    def hold(self, answer: bytes) -> bool:
        """Hold the reply, once it is complete, until it is let go. Returns False while it is incomplete."""
        if not answer.endswith(_READY):
            return False
        self.committed.set()
        self._going.wait()
        return True

    def let_go(self) -> None:
        """Pass the reply on. It is lost if the connection has been closed."""
        self._going.set()


class _Pair:
    """A client's connection, our connection to the server, and the number of our threads that still forward."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.held: Held | None = None
        self.passing = 2
        self._reset = False

    def end(self, *, reset: bool = False) -> None:
        """Shut both connections down, which ends blocking reads. With `reset` the client's connection is reset."""
        self._reset |= reset
        with suppress(OSError):
            if reset:
                # Closing without lingering resets the connection. A shutdown for writing would send a FIN first.
                self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.client.shutdown(socket.SHUT_RD)
                self.client.close()
            elif not self._reset:
                self.client.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close both connections, once no thread forwards any more."""
        self.client.close()
        self.server.close()


class Proxy:
    """Listens on a port of 127.0.0.1 and connects, for each client, to the server through `connect`."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.delay = 0.0  # seconds for each piece that is forwarded
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._pairs: list[_Pair] = []
        self._held: list[Held] = []
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._accepting.start()

    def hold_answer(self, marker: bytes) -> Held:
        """Hold back the reply to the next request that contains these bytes. The server will have done it."""
        held = Held(marker)
        with self._lock:
            self._held.append(held)
        return held

    def freeze(self) -> None:
        """Forward nothing in either direction, and close no connection. New connections hang too."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Forward again, including what was under way."""
        self._flowing.set()

    def cut(self, *, reset: bool = False) -> int:
        """End every connection, with a FIN or a reset. Returns their number. New connections are accepted."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            pair.end(reset=reset)
            if pair.held is not None:
                pair.held.let_go()
        return len(pairs)

    def close(self) -> None:
        """Stop the proxy."""
        for held in self._held:
            held.let_go()
        self.thaw()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
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
            # If the server is down, accept and close the client's connection, as a load balancer does.
            try:
                server = self._connect()
            except OSError:
                client.close()
                continue
            pair = _Pair(client, server)
            with self._lock:
                self._pairs.append(pair)
                self._threads = [thread for thread in self._threads if thread.is_alive()]
                for run in (self._forth, self._back):
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
            pair.passing -= 1
            last = pair.passing == 0
        if last:
            pair.close()

    def _forth(self, pair: _Pair) -> None:
        before = b""
        while data := pair.client.recv(_PIECE):
            self._pass()
            with self._lock:
                for held in self._held:
                    if held.is_in(before + data):
                        pair.held = held
                        self._held.remove(held)
                        break
            before = data[-64:]
            pair.server.sendall(data)

    def _back(self, pair: _Pair) -> None:
        answer = b""
        while data := pair.server.recv(_PIECE):
            self._pass()
            answer += data
            if pair.held is not None:
                if not pair.held.hold(answer):
                    continue
                pair.held = None
            pair.client.sendall(answer)
            answer = b""

    def _pass(self) -> None:
        if self.delay:
            time.sleep(self.delay)
        self._flowing.wait()


@contextmanager
def proxy(connect: Callable[[], socket.socket]) -> Iterator[Proxy]:
    """Run a proxy for the duration of the block."""
    made = Proxy(connect)
    try:
        yield made
    finally:
        made.close()
