"""The Context of a run, which a handler receives with the message.

Must not open anything itself: resources are passed in as functions, which are called at first use.
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

    `handler`, `destination`: their names. `idempotency_key`: the same for each attempt of this delivery, and a new one
    when an operator replays the message; pass it to systems that detect duplicates by such a key. `attempt`: counts
    from 1. `epoch`: increases each time another process takes over the lane; a system that stores the highest epoch can
    reject a process that was frozen and continues late. `replayed`: an operator requested this run.

    `log` is a structlog logger. Each line has the ids of the run (handler, destination, uuid, delivery, attempt), which
    you cannot change. Use a fixed name such as "bed.assigned" as the event. Fields are checked by value, because only
    you know their meaning. These values are printed: a number, a boolean, None, a UUID, or a word (a-z, 0-9, `_`, `.`
    and `-`, at most 40 characters, starting with a letter). All other fields are dropped and counted in `dropped`; at a
    development destination, `dropped_fields` lists their names. So `error=str(exc)`, which may quote a patient, is
    never printed. Use `log.exception("bed.not_assigned")`, which prints the class of the exception and its stack
    frames. Never log a patient identifier that is a number or a word.
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
        """A SQLAlchemy connection to the receiver's database, in the transaction that commits with the success.

        Work on it happens exactly once, or not at all. Do not commit it. For a savepoint, use `begin_nested()`. An ORM
        session bound to it joins the transaction.
        """
        return self._connect()

    @property
    def outbox(self) -> Outbox:
        """The outbox: stores messages to Redox in the transaction of `connection`. A worker sends them after the
        commit.

        So a message is sent only if the handler succeeds; in order for each destination at Redox, and at least once. It
        uses the reply key of the destination (`destination set --reply-with`). Raises ConfigurationError if the
        destination has no reply key.
        """
        return self._outbox()

    @property
    def redox(self) -> RedoxApi:
        """Redox's API, called at once with the reply key of the destination. Use it if you need the response during the
        run.

        A call is not undone if the run fails, and is made again if the handler runs again: use `outbox` for messages.
        Every call is recorded, with a sealed body. Raises ConfigurationError if the destination has no reply key. The
        calls raise the errors of receiver.outbound.
        """
        return self._redox()

    def settings(self, model: type[Model]) -> Model:
        """Return the plugin's settings: an instance of a pydantic model, filled from PLUGIN_<NAME>_* variables.

        NAME is the handler's name in capitals, with - replaced by _. Raises ConfigurationError, which names the invalid
        variables.
        """
        from receiver.handlers.plugin_settings import load_plugin_settings

        return load_plugin_settings(model, self.handler, self._env_file)
