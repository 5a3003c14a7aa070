"""The executor: loads handlers and calls them, inside a handler process.

Must not watch the time: the parent kills the process when a handler exceeds its timeout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from receiver import retry_policy
from receiver.fault_injection.faults import point
from receiver.handlers.context import Context
from receiver.handlers.message import Message
from receiver.keyring import Keyring
from receiver.retry_policy import Outcome
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.evidence.macs import RowMacs
from receiver.storage.queue.connections import OutcomeConnection, PluginConnection
from receiver.worker import discovery
from receiver.worker.discovery import LoadedHandler
from receiver.worker.handler_process.ipc import Ended, FromChild
from receiver.worker.handler_process.plugin_log import RUN, RunIds

if TYPE_CHECKING:
    from receiver.worker.handler_process.redox_access import RedoxAccess

_ended, _reported = point("handler.ended"), point("handler.reported")

# After this many runs the process is replaced, to limit leaks in plugins.
_RUNS_BEFORE_RECYCLE: Final = 10_000


@dataclass(kw_only=True, slots=True)
class ExecutorState:
    """The state of a handler process.

    `send`: sends a message to the parent. `leave`: the parent asked to leave the lane.
    """

    keyring: Keyring = field(repr=False)
    url: str = field(repr=False)  # the database
    records: OutcomeConnection
    work: PluginConnection
    modules: Sequence[str]
    env_file: Path | None
    send: Callable[[FromChild], None]
    seals: Sealer = field(init=False, repr=False)
    macs: RowMacs = field(init=False, repr=False)
    handlers: dict[str, LoadedHandler] = field(default_factory=dict)
    leave: bool = False
    must_recycle: bool = False
    runs: int = 0
    run: RunIds | None = None  # the current run
    _redox_access: RedoxAccess | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.seals = Sealer(self.keyring)
        self.macs = RowMacs(self.keyring)

    def handler(self, name: str) -> LoadedHandler:
        """Return the handler, imported at first use. Raises ConfigurationError."""
        if name not in self.handlers:
            self.handlers[name] = discovery.load_handler(name, self.modules)
        return self.handlers[name]

    def call(
        self, loaded: LoadedHandler, message: Callable[[], Message], context: Context
    ) -> tuple[Any, Outcome | None]:
        """Call the handler. Returns its result, and the Outcome if it did not succeed."""
        here = os.getpid()
        self.runs += 1
        result, outcome = None, None
        try:
            result = loaded.function(message(), context)
            self.work.check()
        except BaseException as exc:  # noqa: BLE001 - every exception of a handler is an outcome, including SystemExit
            if os.getpid() == here:
                outcome = retry_policy.outcome_of(exc)
                self.must_recycle |= isinstance(exc, MemoryError)
        if os.getpid() != here:
            os._exit(0)  # the handler forked and both processes returned: only the parent continues
        self.must_recycle |= self.runs >= _RUNS_BEFORE_RECYCLE
        _ended()
        self.send(Ended())
        _reported()
        return result, outcome

    def context(
        self,
        loaded: LoadedHandler,
        destination: str,
        *,
        uuid: str,
        generation: int,
        attempt: int,
        epoch: int,
        delivery: int | None,
        development: bool,
    ) -> Context:
        """Make the Context for one run of the handler."""
        name = loaded.declaration.name
        self.run = RunIds(
            handler=name,
            destination=destination,
            uuid=uuid,
            delivery=delivery,
            attempt=attempt,
            development=development,
        )
        return Context(
            handler=name,
            destination=destination,
            idempotency_key=f"{uuid}:{name}:{generation}",
            attempt=attempt,
            epoch=epoch,
            replayed=generation > 1,
            _connect=self.work.connection,
            _env_file=self.env_file,
            _redox=lambda: self._get_redox_access().redox(name, destination, uuid),
            _outbox=lambda: self._get_redox_access().outbox(name, destination, uuid, self.work.connection),
            log=structlog.get_logger("plugin").bind(**{RUN: self.run}),
        )

    def _get_redox_access(self) -> RedoxAccess:
        if self._redox_access is None:
            from receiver.worker.handler_process.redox_access import RedoxAccess

            self._redox_access = RedoxAccess(self.url, self.keyring)
        return self._redox_access
