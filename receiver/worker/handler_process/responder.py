"""Responders: has a responder answer a query, inside a handler process, and encodes its answer."""

from __future__ import annotations

from typing import Any

import msgspec

from receiver import retry_policy
from receiver.errors import ReceiverError
from receiver.handlers.context import Context
from receiver.handlers.message import Message
from receiver.worker.discovery import LoadedHandler
from receiver.worker.handler_process.executor import ExecutorState
from receiver.worker.handler_process.ipc import ResponderAnswer, ResponderError, RunResponder, Started


class InvalidAnswer(ReceiverError):
    """The value that a responder returned is not a valid answer."""


def answer(state: ExecutorState, command: RunResponder) -> ResponderAnswer | ResponderError:
    """Call a responder. Raises ConfigurationError if it cannot be loaded."""
    loaded = state.handler(command.handler)
    state.work.timeout = command.timeout
    message = Message(**{name: getattr(command, name) for name in Message.__dataclass_fields__})
    context = state.context(
        loaded,
        command.destination,
        uuid=command.uuid,
        generation=1,
        attempt=1,
        epoch=0,
        delivery=None,
        development=command.development,
    )
    state.send(Started())
    body = b""

    def respond(message: Message, context: Context) -> None:
        nonlocal body
        body = _body(loaded.function(message, context), command.largest)
        state.work.check()
        if state.work.used:
            state.work.commit()

    _, outcome = state.call(
        LoadedHandler(
            declaration=loaded.declaration, function=respond, origin=loaded.origin, development=loaded.development
        ),
        lambda: message,
        context,
    )
    state.work.rollback()
    if outcome is None:
        return ResponderAnswer(body=body, must_recycle=state.must_recycle)
    return ResponderError(
        error_class=outcome.error_class,
        frames=outcome.frames,
        sqlstate=outcome.sqlstate,
        shown=outcome.shown,
        must_recycle=state.must_recycle,
    )


def _body(given: Any, largest: int) -> bytes:
    """Encode a responder's result as JSON. Raises InvalidAnswer, whose text never quotes a value."""
    if not isinstance(given, dict):
        hint = ': return model.model_dump(mode="json", by_alias=True)' if hasattr(given, "model_dump") else ""
        kind = "None" if given is None else retry_policy.class_name_of(type(given))
        raise InvalidAnswer(f"a responder returns a dict, not {kind}{hint}")
    if not isinstance(given.get("Meta"), dict):
        raise InvalidAnswer(
            'an answer has a "Meta" with DataModel and EventType, and what the responder returned has none'
        )
    try:
        body = msgspec.json.encode(given)
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidAnswer(
            "the answer cannot be written as JSON: use dicts with str keys, lists, str, int, float, bool and None"
        ) from exc
    if len(body) > largest:
        raise InvalidAnswer(f"the answer has {len(body)} bytes, and at most {largest} can be sent")
    return body
