"""The handler process: `python -m receiver.worker.handler_process FD FRAMES`, started by receiver.worker.handler_process.supervisor alone.

May not outlive whoever started it, nor a lease: then it kills its own process group, with all that handlers have
started. One thread runs handlers, the other listens and keeps the time.
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
from receiver.worker.discovery import PluginError
from receiver.worker.handler_process import executor, hang, plugin_log
from receiver.worker.handler_process.executor import ExecutorState, LaneRun
from receiver.worker.handler_process.ipc import (
    Channel,
    Command,
    Failed,
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

_LARGEST: Final = (1 << 32) - 1
# What keeps the time when the listening thread cannot, for a handler holds the interpreter: it ends this process alone,
# so the thread goes first.
_BACKSTOP: Final = 2.0


class Listener:
    """The thread that hears what it is told while a handler runs, and ends everything when the time is over."""

    def __init__(self, channel: Channel, room: ExecutorState) -> None:
        self._channel = channel
        self._room = room
        self._until: float | None = None
        self._setting = threading.Lock()
        self._null = Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def start(self) -> None:
        """Listen from now on."""
        threading.Thread(target=self._run, name="listener", daemon=True).start()

    def idle(self) -> None:
        """Nothing is run: there is no time to keep."""
        with self._setting:
            self._until = None
            faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        hang.take_signal()
        try:
            while True:
                said = self._channel.receive(ToChild, self._until)
                if said is not None:
                    self._hear(said)
                elif self._until is not None and time.monotonic() >= self._until:
                    end()
        except BaseException:  # noqa: BLE001 - whoever started us is gone, or this thread cannot go on: no handler may
            end()

    def _hear(self, said: Any) -> None:
        if isinstance(said, LeaveLane):
            self._room.leave = True
        elif isinstance(said, LeaseUntil):
            self._keep(said.until, running=True)
        elif isinstance(said, RunLanes | RunResponder):
            self._room.leave = False
            self._keep(said.until, running=False)
            self.commands.put(said)
        else:
            raise ProtocolViolation

    def _keep(self, until: float, *, running: bool) -> None:
        """Set the time; `running`: only where something runs, for the news may cross with its end."""
        with self._setting:
            if running and self._until is None:
                return
            self._until = until
            patience = max(0.1, until + _BACKSTOP - time.monotonic())
            faulthandler.dump_traceback_later(patience, exit=True, file=self._null)


def end() -> NoReturn:
    """End this process, and all of its group."""
    os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main(descriptor: int, frames: int) -> None:
    """Do what is said on the control channel until it is closed. `frames`: the file for receiver.worker.handler_process.hang."""
    hang.answer_to_signal(frames)
    channel = Channel(socket.socket(fileno=descriptor), _LARGEST)
    try:
        hello = channel.receive(ToChild, None)
        if not isinstance(hello, Init):
            raise ProtocolViolation
        _serve(channel, hello)
    except ReceiverError as exc:
        channel.send(_failed(exc))
    except (EOFError, OSError, ProtocolViolation):
        pass
    end()


def _serve(channel: Channel, hello: Init) -> None:
    sys.path[:] = hello.path
    resource.setrlimit(resource.RLIMIT_DATA, (hello.memory, hello.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold patients' data
    enable.enable_faults(hello.database_url)
    room = ExecutorState(
        keyring=keyrings.load_keyring(Path(hello.keyring)),
        url=hello.database_url,
        records=OutcomeConnection(hello.database_url),
        work=PluginConnection(hello.database_url),
        modules=hello.modules,
        tell=channel.send,
        env_file=None if hello.env_file is None else Path(hello.env_file),
    )
    _log_to(channel, room)
    for name in hello.handlers:
        with suppress(ReceiverError):  # told when it is to be run: the others are not to suffer
            room.handler(name)
    listener = Listener(channel, room)
    listener.start()
    channel.send(Ready())
    while True:
        command = listener.commands.get()
        result = _do(room, command)
        listener.idle()
        channel.send(result)


def _do(room: ExecutorState, command: Command) -> FromChild:
    try:
        return LaneRun(room, command).run() if isinstance(command, RunLanes) else executor.answer(room, command)
    except ReceiverError as exc:
        return _failed(exc)


def _failed(exc: ReceiverError) -> Failed:
    if isinstance(exc, PluginError):
        return Failed(error=exc.failure.summary, error_class=exc.failure.error_class, place=exc.failure.place)
    return Failed(error=str(exc))


def _log_to(channel: Channel, room: ExecutorState) -> None:
    """Hand structlog's lines over to the parent process. Stdout, stderr and the logging module go nowhere: what plugins
    and their libraries print there is anybody's data.
    """

    def forward(_logger: object, method: str, line: MutableMapping[str, Any]) -> NoReturn:
        channel.send(plugin_log.line(method, line, room.run))
        raise structlog.DropEvent

    structlog.configure(processors=[forward], cache_logger_on_first_use=False)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
