"""The one tree of errors.

Every class says in its docstring what happened; that docstring is its message when none is given. If an operator can
fix it, the message names the setting or command. The sender of a request never sees any of these texts: refusals carry
a fixed machine `reason` (for the audit) and a `status_hint` (for the endpoint).

Must not import anything of ours: everything else imports this.
"""

from __future__ import annotations

from inspect import cleandoc


class ReceiverError(Exception):
    """An error in redox-receiver."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or cleandoc(type(self).__doc__ or ""))


class ConfigurationError(ReceiverError):
    """The configuration is not valid; the message names the setting or the command that fixes it."""


class NotFound(ReceiverError):
    """Nothing of that name or id is registered or recorded."""


class Conflict(ReceiverError):
    """The present state of the object does not allow this."""


class Unavailable(ReceiverError):
    """The ledger cannot record right now; the sender must try again (503)."""


class DatabaseUnavailable(Unavailable):
    """The database cannot be reached, or refuses. `problem` says what is wrong, `fix` which setting to look at."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(f"{problem}: {fix}")
        self.problem, self.fix = problem, fix


class IntegrityError(ReceiverError):
    """A stored value fails verification: its MAC or its seal is wrong."""


class UnknownKey(IntegrityError):
    """A stored value names a key that this host's keyring lacks, so it can be neither verified nor opened."""


class ProofInvalid(ReceiverError):
    """A proof, a checkpoint or a public key is malformed, or fails verification."""


class Refusal(ReceiverError):
    """A request that is answered with a refusal.

    `reason` is a fixed lower_snake_case word; `status_hint` the HTTP status that fits, which the endpoint may follow.
    """

    status_hint: int = 400

    def __init__(self, reason: str, *, status_hint: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        if status_hint is not None:
            self.status_hint = status_hint


class Unverified(Refusal):
    """Not proved to be Redox's. Every cause is answered alike (401); only the audit says which it was."""

    status_hint = 401


class UnknownSource(Refusal):
    """Proved to be Redox's, from a source that is not registered for this destination."""

    status_hint = 403


class BadTransfer(Refusal):
    """The body did not arrive whole, or exceeds the limit."""


class Unreadable(Refusal):
    """Authentic, but no message that can be read: kept in quarantine and answered 200; a query is answered 400.

    `query` is the kind of what calls itself a query in spite of all, else None.
    """

    query: str | None = None


# What a handler may say. Exported for plugin authors by receiver.handlers.


class RetryLater(ReceiverError):
    """The system that a handler depends on is away: try again later, without using up an attempt."""

    def __init__(self, after: float = 60.0) -> None:
        super().__init__(f"retry after {after:g} s")
        self.after = after


class GiveUp(ReceiverError):
    """This delivery can never succeed: dead at once. `code` is a fixed word of the plugin's, free of patients' data."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class WorkAborted(ReceiverError):
    """A statement on context.connection failed, and the handler caught the error and returned.

    `sqlstate` and `frames` (module:line:function) describe the statement.
    """

    def __init__(self, code: str | None, frames: tuple[str, ...]) -> None:
        super().__init__(
            "an SQL statement on context.connection failed and the handler caught the error, so "
            "PostgreSQL commits nothing of its transaction: run what may fail within "
            "context.connection.begin_nested(), or let the error through"
        )
        self.sqlstate = code
        self.frames = frames
