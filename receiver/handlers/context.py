"""What a handler gets with the message.

Must not open anything by itself: what costs something is handed in as a function, called when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel
    from sqlalchemy import Connection
    from structlog.typing import FilteringBoundLogger

    from receiver.outbound.api import RedoxApi
    from receiver.outbound.outbox import Outbox

    Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """One run of one handler.

    `handler`, `destination`: their names. `idempotency_key`: the same for each attempt of this delivery, another one
    when an operator replays the message: give it to systems that can tell a repetition by it. `attempt` counts from 1.
    `epoch` grows each time the lane is taken over: a system that remembers the highest can refuse a process that was
    frozen and comes back late. `replayed`: an operator asked for this run.

    `log` is a structlog logger. Each line carries the ids of the run (handler, destination, uuid, delivery, attempt),
    which you cannot change. An event is a fixed name such as "bed.assigned". Fields are judged by their value, for
    nobody but you knows what they mean: a number, a boolean, None, a UUID, or a word (a-z, 0-9, `_`, `.` and `-`, at
    most 40, a letter first) is printed; anything else is dropped and counted as `dropped`, which at a development
    destination comes with the names (`dropped_fields`). So `error=str(exc)`, which may quote a patient, is never
    printed: use `log.exception("bed.not_assigned")`, which prints the class of the exception and its frames. Never give
    it a patient's identifier that is a number or a word.
    """

    handler: str
    destination: str
    idempotency_key: str
    attempt: int
    epoch: int
    replayed: bool
    log: FilteringBoundLogger = field(repr=False)
    _connect: Callable[[], Connection] = field(repr=False)
    _redox: Callable[[], RedoxApi] = field(repr=False)
    _outbox: Callable[[], Outbox] = field(repr=False)
    _env_file: Path | None = field(default=None, repr=False)

    @property
    def connection(self) -> Connection:
        """A SQLAlchemy connection to the receiver's database, in a transaction that is committed with the success.

        What is done on it happens exactly once, or not at all. It may not be committed: use `begin_nested()` for a
        savepoint; an ORM session bound to it joins the transaction.
        """
        return self._connect()

    @property
    def outbox(self) -> Outbox:
        """Messages to Redox, kept in the transaction of `connection` and sent by a worker after its commit.

        So what is sent is sent if the handler succeeds, and not otherwise; in order for each destination at Redox, and
        at least once. It speaks with the key that the destination replies with (`destination set --reply-with`).
        Raises ConfigurationError when that has none.
        """
        return self._outbox()

    @property
    def redox(self) -> RedoxApi:
        """Redox's API, called at once, with the key that the destination replies with: for what an answer is needed of.

        A call that was made stays made, whatever becomes of this run, and is made again when the handler runs again: a
        message belongs in `outbox`. Every call is on record, its body sealed. Raises ConfigurationError when the
        destination has no key; the calls raise the errors of receiver.outbound.
        """
        return self._redox()

    def settings(self, model: type[Model]) -> Model:
        """The plugin's settings: an instance of a pydantic model, filled from PLUGIN_<NAME>_* variables.

        NAME is the handler's in capitals, - as _. Raises ConfigurationError naming the variables that are wrong.
        """
        from receiver.handlers.plugin_settings import load_plugin_settings

        return load_plugin_settings(model, self.handler, self._env_file)
