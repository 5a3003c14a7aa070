"""The handler process, as its parent sees it: starts it, exchanges messages with it, and kills it.

Must not decide when to kill it (see receiver.worker.handler_process.supervisor).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any, Final

import structlog

from receiver.errors import ConfigurationError, ReceiverError
from receiver.worker.handler_process import hang
from receiver.worker.handler_process.attempt_log import log_attempt
from receiver.worker.handler_process.ipc import (
    CannotExecute,
    Channel,
    FromChild,
    Init,
    Log,
    ProtocolViolation,
    Ready,
    RunLanes,
    RunResponder,
    ToChild,
    Unsuccessful,
)
from receiver.worker.load_failure import LoadFailure, PluginError

plugin_log: Final = structlog.get_logger("receiver.plugin")

# Seconds for a process to start and to import its plugins, which may be slow.
START_TIMEOUT: Final = 60.0
# Seconds for a process to read a message.
_SEND_TIMEOUT: Final = 10.0
# The largest frame, in bytes: an answer and its envelope.
_LARGEST: Final = 64 * 1024 * 1024


class HandlerProcessGone(ReceiverError):
    """The handler process ended by itself, or violated the protocol."""


class HandlerProcess:
    """One handler process, in its own session. For one thread, except `tell`."""

    def __init__(self, init: Init) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(_SEND_TIMEOUT)
        self._stack = hang.new_file()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "receiver.worker.handler_process", str(theirs.fileno()), str(self._stack)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), self._stack],
                start_new_session=True,
            )
        self._end = os.pidfd_open(self._process.pid)
        self._channel = Channel(ours, _LARGEST)
        self._init = init
        self.handler = self.destination = ""  # what is run, for the log

    @property
    def pid(self) -> int:
        """The process id. It is also the id of the process group."""
        return self._process.pid

    def start(self) -> None:
        """Wait until the process is ready.

        Raises ConfigurationError if it cannot load a handler, HandlerProcessGone if it does not start.
        """
        self._send(self._init)
        message = self.receive(time.monotonic() + START_TIMEOUT)
        if isinstance(message, CannotExecute):
            raise load_error(message)
        if not isinstance(message, Ready):
            raise HandlerProcessGone("the handler process did not start")

    def tell(self, message: ToChild) -> None:
        """Send a message. Raises OSError if the process does not read it."""
        self._channel.send(message)

    def command(self, message: RunLanes | RunResponder) -> None:
        """Send a command. Raises HandlerProcessGone."""
        self.handler, self.destination = message.handler, message.destination
        self._send(message)

    def _send(self, message: ToChild) -> None:
        try:
            self._channel.send(message)
        except OSError as exc:
            raise HandlerProcessGone("the handler process does not read its messages") from exc

    def receive(self, deadline: float) -> Any:
        """Return the next message, or None at the deadline. Log lines are written to the log. Raises
        HandlerProcessGone.
        """
        while True:
            try:
                message = self._channel.receive(FromChild, deadline, self._end)
            except (EOFError, ProtocolViolation) as exc:
                raise HandlerProcessGone from exc
            if isinstance(message, Log):
                level = message.level if message.level in ("debug", "info", "warning") else "error"
                dropped = {"dropped": message.dropped} if message.dropped else {}
                named = {"dropped_fields": list(message.names)} if message.names else {}
                getattr(plugin_log, level)(message.event, **(message.fields | dropped | named))
            elif isinstance(message, Unsuccessful):
                log_attempt(message, self.handler, self.destination)
            elif message is not None or time.monotonic() >= deadline:
                return message
            else:
                raise HandlerProcessGone

    def stack(self) -> tuple[str, ...]:
        """Return the frames of the running handler as module:line:function, outermost first."""
        return hang.frames(self._process.pid, self._stack, self._init.path)

    def kill(self) -> str:
        """Kill the process and its group. Returns how it ended, as one word."""
        # The process is not reaped yet, so its id and its group's id cannot have been reused.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        self._channel.close()
        os.close(self._end)
        os.close(self._stack)
        return signal.Signals(-status).name if status < 0 else f"Exit{status}"

    def ended(self) -> bool:
        """Return True if the process has ended by itself."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def load_error(message: CannotExecute) -> ConfigurationError:
    """Return the error for a handler that the process cannot load."""
    if not message.error_class:
        return ConfigurationError(message.error)
    return PluginError(
        LoadFailure(
            handler=None,
            origin="",
            error_class=message.error_class,
            place=message.place,
            summary=message.error,
            message=message.error,
        )
    )
