"""The control channel between a worker or receiver and a handler process: messages and framing.

Must not act on the messages. A frame is a length (four bytes, big-endian) and a message in msgpack.
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
    """The other side sent something that is not valid in this protocol."""


class _Frame(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


# --- To the handler process


class Init(_Frame, frozen=True, kw_only=True):
    """The first message. `path`: Python's module search path. `memory`: the limit of data memory, in bytes."""

    database_url: str
    keyring: str
    modules: tuple[str, ...]
    handlers: tuple[str, ...]
    path: tuple[str, ...]
    memory: int
    env_file: str | None


class RunLanes(_Frame, frozen=True, kw_only=True):
    """Run the pending deliveries of these lanes (name and epoch), in order.

    A single lane is run until it is empty; of several lanes, only the first few deliveries of each are run. `until`:
    when the lease ends. `leave_at`: when other lanes may need the process. Both are on the system's monotonic clock.
    `up_to`: with an inline policy, the last delivery to run.
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
    """Call a responder to answer a query."""

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
    """The lease is renewed until `until`."""

    until: float


class LeaveLane(_Frame, frozen=True, kw_only=True):
    """Leave the lane after the current delivery."""


# --- From the handler process


class Ready(_Frame, frozen=True, kw_only=True):
    """The process has started."""


class CannotExecute(_Frame, frozen=True, kw_only=True):
    """The command cannot be executed; the reason is for the operator. `error_class` and `place`: of a failed plugin
    import.
    """

    error: str
    error_class: str = ""
    place: str | None = None


class Started(_Frame, frozen=True, kw_only=True):
    """The handler is about to be called, and the attempt is recorded. `delivery` is 0 for a responder."""

    lane: str = ""
    delivery: int = 0
    attempt: int = 0
    deferred_for: float = 0.0


class Ended(_Frame, frozen=True, kw_only=True):
    """The handler has returned or raised. Its outcome is about to be recorded."""


class Unsuccessful(_Frame, frozen=True, kw_only=True):
    """An attempt did not succeed, and this is recorded. For the log.

    `state`: the new state of the delivery. `shown`: the error's text, if the receiver wrote it. `pause`: seconds until
    the next attempt.
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
    """The lane, or the last of several lanes, is left. `why`:

    - "empty": there is nothing more to run now
    - "time": there may be more to run
    - "dead": the last delivery is dead, with the error `error_class`
    - "waiting": the last delivery failed, and the lane waits
    - "fenced": another process holds the lease
    - "lost": the database failed, with the error `error_class`

    `must_recycle`: the process should be replaced. `succeeded`: the run times, in seconds, of the deliveries that
    succeeded since the command, for the metrics.
    """

    why: Literal["empty", "time", "dead", "waiting", "fenced", "lost"]
    error_class: str = ""
    must_recycle: bool = False
    succeeded: tuple[float, ...] = ()


class ResponderAnswer(_Frame, frozen=True, kw_only=True):
    """The responder's answer, in JSON."""

    body: bytes
    must_recycle: bool = False


class ResponderError(_Frame, frozen=True, kw_only=True):
    """The responder raised, or its result is not a valid answer. `shown`: as in Unsuccessful."""

    error_class: str
    frames: tuple[str, ...]
    sqlstate: str | None = None
    shown: str | None = None
    must_recycle: bool = False


class Log(_Frame, frozen=True, kw_only=True):
    """A log line of a plugin.

    `dropped`: how many of its fields must not be printed. `names`: their names, at a development destination.
    """

    level: str
    event: str
    fields: dict[str, Any]
    dropped: int = 0
    names: tuple[str, ...] = ()


Command = RunLanes | RunResponder
ToChild = Init | Command | LeaseUntil | LeaveLane
FromChild = Ready | CannotExecute | Started | Ended | Unsuccessful | LaneDone | ResponderAnswer | ResponderError | Log


class Channel:
    """One end of the channel. Any thread may send; one thread receives. A frame over `largest` bytes is a violation."""

    def __init__(self, end: socket.socket, largest: int) -> None:
        self._socket = end
        self._largest = largest
        self._sending = threading.Lock()
        self._buffer = bytearray()

    def fileno(self) -> int:
        """For `select` and `poll`."""
        return self._socket.fileno()

    def send(self, message: ToChild | FromChild) -> None:
        """Send a message. Raises OSError if the other end is gone, or does not read within the socket's timeout."""
        body = msgspec.msgpack.encode(message)
        with self._sending:
            self._socket.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self, kinds: Any, deadline: float | None, *others: int) -> Any:
        """Return the next message, which must be one of `kinds`.

        Returns None at `deadline` (monotonic), or when one of the descriptors `others` is ready and no message is.
        Raises EOFError when the other end is closed, ProtocolViolation when the message is not valid.
        """
        while (message := self._complete(kinds)) is None:
            # poll, not select: in a receiver with many connections, descriptors can exceed 1024.
            poll = select.poll()
            for descriptor in (self._socket.fileno(), *others):
                poll.register(descriptor, select.POLLIN)
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            if self._socket.fileno() not in dict(poll.poll(timeout)):
                return None
            try:
                piece = self._socket.recv(_PIECE)
            except OSError as exc:
                raise EOFError from exc
            if not piece:
                raise EOFError
            self._buffer += piece
        return message

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
                message = msgspec.msgpack.decode(body, type=kinds)
            except msgspec.MsgspecError as exc:
                raise ProtocolViolation("no_frame") from exc
        del self._buffer[:end]
        return message
