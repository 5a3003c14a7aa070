"""The control channel between a worker or receiver and a handler process: what is said on it, and how.

May not know what is done about it. A frame is four bytes of length, big-endian, and a message in msgpack.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from datetime import datetime
from typing import Any, Final, Literal

import msgspec

from receiver.retry_policy import RetryPolicy

_LENGTH: Final = struct.Struct(">I")
_PIECE: Final = 1 << 18


class ProtocolViolation(Exception):
    """What the other side says is not of this protocol."""


class _Frame(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


# --- to the handler process


class Init(_Frame, frozen=True, kw_only=True):
    """The first thing said. `path`: where Python looks for modules; `memory`: bytes of data that may be allocated."""

    database_url: str
    keyring: str
    modules: tuple[str, ...]
    handlers: tuple[str, ...]
    path: tuple[str, ...]
    memory: int
    env_file: str | None


class RunLanes(_Frame, frozen=True, kw_only=True):
    """Run what is pending in these lanes (name and epoch), one lane after another: all there is in a single one, the
    first few of each of many.

    `until`: when the lease ends, `leave_at`: when others may want the process, both on the system's monotonic clock.
    `up_to`: with an inline policy, the last delivery to be run.
    """

    lanes: tuple[tuple[str, int], ...]
    owner: str
    handler: str
    destination: str
    policy: RetryPolicy
    timeout: float
    until: float
    leave_at: float
    up_to: int = 0
    development: bool = False


class RunResponder(_Frame, frozen=True, kw_only=True):
    """Have a responder answer a query."""

    handler: str
    destination: str
    timeout: float
    until: float
    largest: int
    uuid: str
    kind: str
    source_id: str | None
    log_id: str | None
    message_id: str | None
    transmission_id: str | None
    facility: str | None
    event_time: datetime | None
    received_at: datetime
    test: bool
    raw: bytes
    development: bool = False


class LeaseUntil(_Frame, frozen=True, kw_only=True):
    """The lease was renewed until then."""

    until: float


class LeaveLane(_Frame, frozen=True, kw_only=True):
    """Leave the lane after the delivery that is being run."""


# --- from the handler process


class Ready(_Frame, frozen=True, kw_only=True):
    """It has started."""


class Failed(_Frame, frozen=True, kw_only=True):
    """It cannot do what it was told to: why, for the operator. `error_class` and `place`: of a plugin's import."""

    error: str
    error_class: str = ""
    place: str | None = None


class Started(_Frame, frozen=True, kw_only=True):
    """A handler is about to be called; its attempt is recorded. `delivery` 0: a responder."""

    lane: str = ""
    delivery: int = 0
    attempt: int = 0
    deferred_for: float = 0.0


class Ended(_Frame, frozen=True, kw_only=True):
    """The handler has returned or raised; the outcome is about to be recorded."""


class Unsuccessful(_Frame, frozen=True, kw_only=True):
    """An attempt did not succeed, and that is recorded: for the log. `state`: of the delivery now. `shown`: the error's
    text, where the receiver wrote it. `pause`: seconds until the next attempt.
    """

    lane: str
    delivery: int
    attempt: int
    state: str
    outcome: str
    error_class: str
    frames: tuple[str, ...] = ()
    sqlstate: str | None = None
    shown: str | None = None
    pause: float | None = None


class LaneDone(_Frame, frozen=True, kw_only=True):
    """The lane is left, or the last one of many. `why`:

    "empty": nothing there that may run now · "time": there may be more · "dead": the last one run is dead, of
    `error_class` · "waiting": the last one failed, and what comes after it waits · "fenced": the lease is another's ·
    "lost": the database failed, with the error of `error_class`. `worn`: the process had better be replaced.
    """

    why: Literal["empty", "time", "dead", "waiting", "fenced", "lost"]
    error_class: str = ""
    must_recycle: bool = False


class ResponderAnswer(_Frame, frozen=True, kw_only=True):
    """The responder's answer, in JSON."""

    body: bytes
    must_recycle: bool = False


class ResponderError(_Frame, frozen=True, kw_only=True):
    """The responder raised, or what it returned is not an answer. `shown` as in Unsuccessful."""

    error_class: str
    frames: tuple[str, ...]
    sqlstate: str | None = None
    shown: str | None = None
    must_recycle: bool = False


class Log(_Frame, frozen=True, kw_only=True):
    """A log line of a plugin's. `dropped`: how many of its fields may not be printed; `names`: theirs, at a
    development destination.
    """

    level: str
    event: str
    fields: dict[str, Any]
    dropped: int = 0
    names: tuple[str, ...] = ()


Command = RunLanes | RunResponder
ToChild = Init | Command | LeaseUntil | LeaveLane
FromChild = Ready | Failed | Started | Ended | Unsuccessful | LaneDone | ResponderAnswer | ResponderError | Log


class Channel:
    """One end. Sending is safe in threads; receiving is one thread's. A frame larger than `largest` breaks it."""

    def __init__(self, end: socket.socket, largest: int) -> None:
        self._socket = end
        self._largest = largest
        self._sending = threading.Lock()
        self._buffer = bytearray()

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    def send(self, said: ToChild | FromChild) -> None:
        """Raises OSError when the other end is gone, or does not read within the socket's time-out."""
        body = msgspec.msgpack.encode(said)
        with self._sending:
            self._socket.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self, kinds: Any, deadline: float | None, *others: int) -> Any:
        """The next thing said, of one of `kinds`; None at `deadline` (monotonic), or once one of the descriptors
        `others` is ready while nothing is said.

        Raises EOFError when the other end is closed, Broken on nonsense.
        """
        while (said := self._complete(kinds)) is None:
            # poll, not select: a receiver with many connections has descriptors beyond 1024.
            poll = select.poll()
            for descriptor in (self._socket.fileno(), *others):
                poll.register(descriptor, select.POLLIN)
            patience = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            if self._socket.fileno() not in dict(poll.poll(patience)):
                return None
            try:
                piece = self._socket.recv(_PIECE)
            except OSError as exc:
                raise EOFError from exc
            if not piece:
                raise EOFError
            self._buffer += piece
        return said

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _complete(self, kinds: Any) -> Any:
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > self._largest:
            raise ProtocolViolation("too_large")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as whole, whole[_LENGTH.size : end] as body:
            try:
                said = msgspec.msgpack.decode(body, type=kinds)
            except msgspec.MsgspecError as exc:
                raise ProtocolViolation("no_frame") from exc
        del self._buffer[:end]
        return said
