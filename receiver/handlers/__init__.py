"""The plugin contract: everything that a handler plugin needs is imported from here, and stands on this page.

Must not import anything that is slow: every handler process imports this.

    from receiver.handlers import Context, GiveUp, Message, RetryLater, handler, responder

    @handler("PatientAdmin.Arrival", "PatientAdmin.NewPatient", name="register", ordering="patient", patient_key="MR")
    def register(message: Message, context: Context) -> None:
        context.connection.execute(text("INSERT …"), {"mrn": message.data["Patient"]["Identifiers"][0]["ID"]})

    @responder("PatientSearch.Query", name="search", timeout=20)
    def search(message: Message, context: Context) -> dict[str, Any]:
        return {"Meta": {"DataModel": "PatientSearch", "EventType": "Response"}, "Patient": None}

A plugin lists each in its pyproject.toml, under the same name:

    [project.entry-points."redox_receiver.handlers"]
    register = "my_plugin.admissions:register"

and `redox-receiver handlers enable register --destination D` binds it. While developing,
RECEIVER_HANDLERS=my_plugin.admissions binds all that the module holds to every development destination.

What a handler does, and what becomes of the delivery:

    returns                  succeeded; what it did on `context.connection` is committed in the same transaction
    raise RetryLater(after)  their system is away: again after `after` seconds, for up to 72 hours; no attempt used
    raise GiveUp(code)       it can never succeed: dead at once; `code` is a fixed word, free of patients' data
    lets an error of receiver.outbound through
    that is `retryable`      as RetryLater
    raises anything else,
    overruns its timeout,
    or ends its process      a failed attempt: again after a pause that doubles (2 s to 10 min), and after
                             `max_attempts` dead

A handler is a plain synchronous function. It runs in a process of its own, which is killed at its timeout with all
that it has started; what it prints goes nowhere. It may be run again after it has succeeded, when a machine failed
before that could be recorded: work on `context.connection` happens exactly once all the same; another system is to be
given `context.idempotency_key`.

A statement on `context.connection` that may fail belongs in `context.connection.begin_nested()`: caught without it, its
error leaves a transaction that PostgreSQL does not commit, and the attempt fails.

What a handler logs is judged field by field: see `Context`. The text of what it raises is sealed, for it may quote a
patient: `redox-receiver deliveries show ID --error --reason …` opens it. `redox-receiver handlers check` imports a
plugin as a worker does; without a database, as in continuous integration, it imports all that is installed.

To answer by a message of its own it says `context.outbox.send({"Meta": …})`: sent once it has succeeded, in order, at
least once. What it must know now it asks Redox by `context.redox.query(…)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from receiver.errors import GiveUp, RetryLater
from receiver.handlers.context import Context
from receiver.handlers.declaration import MAX_ATTEMPTS, TIMEOUT, Declaration, declare
from receiver.handlers.message import Message

__all__ = ["Context", "GiveUp", "Message", "RetryLater", "handler", "responder"]

_Handler = TypeVar("_Handler", bound=Callable[[Message, Context], None])
_Responder = TypeVar("_Responder", bound=Callable[[Message, Context], dict[str, Any]])


def handler(
    *patterns: str,
    name: str,
    ordering: Literal["source", "patient", "none"] = "source",
    patient_key: str | None = None,
    acknowledge: Literal["after_commit", "after_handling"] = "after_commit",
    on_failure: Literal["dead", "hold"] = "dead",
    max_attempts: int = MAX_ATTEMPTS,
    timeout: float = TIMEOUT,
) -> Callable[[_Handler], _Handler]:
    """Declare a handler of notifications. The function stays as it is.

    `patterns`: `Model.Event`, `Model.*`, `FHIR.*` or `*`. Queries are never among what they match.
    `name`: a-z, 0-9, - and _, at most 40. It stands in the registry and in every delivery: never change it.
    `ordering`: what must not overtake: all of a source's messages; all of a patient's, who is known by the identifier
    of type `patient_key` (a message without one keeps its source's order; merges of patients are not ordered); nothing.
    `acknowledge`: "after_handling" runs it within the request, and Redox is told 503 until it succeeded.
    `on_failure`: after the last attempt the delivery is dead and the lane goes on; or the lane is held until
    `lanes release`. `timeout`: seconds.

    Raises ConfigurationError.
    """
    return declare(
        Declaration(
            role="handler",
            patterns=patterns,
            name=name,
            ordering=ordering,
            patient_key=patient_key,
            acknowledge=acknowledge,
            on_failure=on_failure,
            max_attempts=max_attempts,
            timeout=timeout,
        )
    )


def responder(*queries: str, name: str, timeout: float = 20.0) -> Callable[[_Responder], _Responder]:
    """Declare the one that answers queries, within the request.

    It returns the body of the answer: a dict with a "Meta", of values that JSON has, at most 10 MiB.

    `queries`: their kinds in full, such as "PatientSearch.Query". `timeout`: seconds; Redox allows 120 in all, its own
    time included. Raises ConfigurationError.
    """
    return declare(Declaration(role="responder", patterns=queries, name=name, max_attempts=1, timeout=timeout))
