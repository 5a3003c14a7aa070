"""The plugin API: a handler plugin imports everything it needs from here. This page is its manual.

Must not import slow modules: every handler process imports this one.

    from receiver.handlers import Context, GiveUp, Message, RetryLater, handler, responder

    @handler("PatientAdmin.Arrival", "PatientAdmin.NewPatient", name="register", ordering="patient", patient_key="MR")
    def register(message: Message, context: Context) -> None:
        context.connection.execute(text("INSERT …"), {"mrn": message.data["Patient"]["Identifiers"][0]["ID"]})

    @responder("PatientSearch.Query", name="search", timeout=20)
    def search(message: Message, context: Context) -> dict[str, Any]:
        return {"Meta": {"DataModel": "PatientSearch", "EventType": "Response"}, "Patient": None}

Declare each handler in the plugin's pyproject.toml, under the same name:

    [project.entry-points."redox_receiver.handlers"]
    register = "my_plugin.admissions:register"

To bind it to a destination, run `redox-receiver handlers enable register --destination D`. During development,
RECEIVER_HANDLERS=my_plugin.admissions binds all handlers of that module to every development destination.

The end of a handler's run decides the state of the delivery:

    returns                  succeeded; its work on `context.connection` commits in the same transaction
    raise RetryLater(after)  another system is unavailable: run again after `after` seconds, for up to 72 hours;
                             this does not count as an attempt
    raise GiveUp(code)       it can never succeed: dead at once; `code` is a fixed word without patient data
    raises an error of receiver.outbound
    that is `retryable`      as RetryLater
    raises anything else,
    exceeds its timeout,
    or ends its process      a failed attempt: run again after a pause that doubles (2 s to 10 min); dead after
                             `max_attempts`

A handler is a synchronous function. It runs in a separate process. At its timeout, the process is killed with
everything that it has started. Its output to stdout and stderr is discarded. It may run again after it has succeeded,
if a host failed before the success was recorded. Work on `context.connection` still happens exactly once. For other
systems, pass them `context.idempotency_key`.

If a statement on `context.connection` may fail, run it in `context.connection.begin_nested()`. If you catch its error
without that, PostgreSQL cannot commit the transaction, and the attempt fails.

Log fields are checked one by one: see `Context`. The text of an exception is sealed, because it may quote a patient. To
open it, run `redox-receiver deliveries show ID --error --reason …`. To test that a plugin can be imported as a worker
does it, run `redox-receiver handlers check`. Without a database, as in continuous integration, it imports all installed
plugins.

To respond with a message to Redox, call `context.outbox.send({"Meta": …})`: it is sent after the handler has succeeded,
in order, at least once. To query Redox during the run, call `context.redox.query(…)`.
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
    """Declare a handler of notifications. The decorator returns the function unchanged.

    - `patterns`: `Model.Event`, `Model.*`, `FHIR.*` or `*`. They never match queries.
    - `name`: a-z, 0-9, - and _, at most 40 characters. The registry and every delivery refer to it: never change it.
    - `ordering`: which messages are handled in order. "source": all messages of a source. "patient": all messages of a
      patient, identified by the identifier of type `patient_key`; a message without one is ordered by source, and
      merges of patients are not ordered. "none": no order.
    - `acknowledge`: "after_handling" runs the handler within the request; Redox receives 503 until it has succeeded.
    - `on_failure`: after the last attempt, "dead" ends the delivery and the lane continues; "hold" blocks the lane
      until `lanes release`.
    - `timeout`: seconds.

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
    """Declare a responder, which answers queries within the request.

    The function returns the body of the answer: a dict with a "Meta" whose values JSON can represent, at most 10 MiB.

    `queries`: complete kinds, such as "PatientSearch.Query". `timeout`: seconds. Redox allows 120 in all, including its
    own time. Raises ConfigurationError.
    """
    return declare(Declaration(role="responder", patterns=queries, name=name, max_attempts=1, timeout=timeout))
