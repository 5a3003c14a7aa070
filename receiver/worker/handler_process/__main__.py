"""Entry point of the handler process: `python -m receiver.worker.handler_process FD FRAMES`.

Only receiver.worker.handler_process.supervisor starts it. Must not outlive its parent or its lease: when either ends,
it kills its own process group, including everything that handlers have started. One thread runs handlers. The other
receives messages and enforces the deadline.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn

import structlog

from receiver import keyring as keyrings
from receiver.errors import ReceiverError
from receiver.fault_injection import enable
from receiver.storage.queue.connections import OutcomeConnection, PluginConnection
from receiver.worker.handler_process import hang, plugin_log, responder
from receiver.worker.handler_process.executor import ExecutorState
from receiver.worker.handler_process.ipc import (
    CannotExecute,
    Channel,
    Command,
    FromChild,
    Init,
    LeaseUntil,
    LeaveLane,
    ProtocolViolation,
    Ready,
    RunLanes,
    RunResponder,
    ToChild,
)
from receiver.worker.handler_process.lane_executor import LaneExecutor
from receiver.worker.load_failure import PluginError

_LARGEST: Final = (1 << 32) - 1
# Seconds after the deadline until faulthandler ends the process. It applies when the listener thread cannot run because
# a handler holds the interpreter lock. It ends only this process, so the listener thread acts first.
_BACKSTOP: Final = 2.0


class Listener:
    """The thread that receives messages while a handler runs, and ends the process group at the deadline."""

    def __init__(self, channel: Channel, state: ExecutorState) -> None:
        self._channel = channel
        self._state = state
        self._until: float | None = None
        self._setting = threading.Lock()
        self._null = Path(os.devnull).open("w")  # noqa: SIM115 - open for the life of the process
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="listener", daemon=True).start()

    def idle(self) -> None:
        """Clear the deadline: nothing is running."""
        with self._setting:
            self._until = None
            faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        hang.take_signal()
        try:
            while True:
                message = self._channel.receive(ToChild, self._until)
                if message is not None:
                    self._handle(message)
                elif self._until is not None and time.monotonic() >= self._until:
                    end()
        except BaseException:  # noqa: BLE001 - the parent is gone or this thread failed: no handler may continue
            end()

    def _handle(self, message: Any) -> None:
        if isinstance(message, LeaveLane):
            self._state.leave = True
        elif isinstance(message, LeaseUntil):
            self._set_deadline(message.until, running=True)
        elif isinstance(message, RunLanes | RunResponder):
            self._state.leave = False
            self._set_deadline(message.until, running=False)
            self.commands.put(message)
        else:
            raise ProtocolViolation

    def _set_deadline(self, until: float, *, running: bool) -> None:
        """Set the deadline. `running`: only if something runs, because the message can arrive just after the run has
        ended.
        """
        with self._setting:
            if running and self._until is None:
                return
            self._until = until
            timeout = max(0.1, until + _BACKSTOP - time.monotonic())
            faulthandler.dump_traceback_later(timeout, exit=True, file=self._null)


def end() -> NoReturn:
    """Kill this process and its process group."""
    os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main(descriptor: int, frames: int) -> None:
    """Execute the commands of the control channel until it is closed.

    `frames`: the descriptor of the file for receiver.worker.handler_process.hang.
    """
    hang.answer_to_signal(frames)
    channel = Channel(socket.socket(fileno=descriptor), _LARGEST)
    try:
        init = channel.receive(ToChild, None)
        if not isinstance(init, Init):
            raise ProtocolViolation
        _serve(channel, init)
    except ReceiverError as exc:
        channel.send(_failed(exc))
    except (EOFError, OSError, ProtocolViolation):
        pass
    end()


def _serve(channel: Channel, init: Init) -> None:
    sys.path[:] = init.path
    resource.setrlimit(resource.RLIMIT_DATA, (init.memory, init.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would contain patient data
    enable.enable_faults(init.database_url)
    state = ExecutorState(
        keyring=keyrings.load_keyring(Path(init.keyring)),
        url=init.database_url,
        records=OutcomeConnection(init.database_url),
        work=PluginConnection(init.database_url),
        modules=init.modules,
        send=channel.send,
        env_file=None if init.env_file is None else Path(init.env_file),
    )
    _forward_logs(channel, state)
    for name in init.handlers:
        with suppress(ReceiverError):  # reported when the handler is run: the other handlers must still load
            state.handler(name)
    listener = Listener(channel, state)
    listener.start()
    channel.send(Ready())
    while True:
        command = listener.commands.get()
        result = _execute(state, command)
        listener.idle()
        channel.send(result)


def _execute(state: ExecutorState, command: Command) -> FromChild:
    try:
        return LaneExecutor(state, command).run() if isinstance(command, RunLanes) else responder.answer(state, command)
    except ReceiverError as exc:
        return _failed(exc)


def _failed(exc: ReceiverError) -> CannotExecute:
    if isinstance(exc, PluginError):
        return CannotExecute(error=exc.failure.summary, error_class=exc.failure.error_class, place=exc.failure.place)
    return CannotExecute(error=str(exc))


def _forward_logs(channel: Channel, state: ExecutorState) -> None:
    """Send structlog lines to the parent process.

    Stdout, stderr and the logging module are discarded, because the data that plugins and their libraries print there
    is unknown.
    """

    def forward(_logger: object, method: str, line: MutableMapping[str, Any]) -> NoReturn:
        channel.send(plugin_log.line(method, line, state.run))
        raise structlog.DropEvent

    structlog.configure(processors=[forward], cache_logger_on_first_use=False)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
