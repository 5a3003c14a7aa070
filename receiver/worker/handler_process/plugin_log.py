"""Filter for plugin log lines: decides what may be printed. The docstring of receiver.handlers.Context has the rule.

A field is printed or not by its value (receiver.log_redaction.printable), because a plugin's keys may mean anything.
The ids of the run belong to the receiver: a plugin's field with such a name is dropped. Must not print anything itself.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from receiver import log_redaction, retry_policy
from receiver.worker.handler_process.ipc import Log

# A log line holds the ids of its run under this key. A RunIds value is the receiver's; any other value is a plugin's
# field.
RUN: Final = "_run"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIds:
    """The ids in each log line of a run. `development`: the destination is a development one."""

    handler: str
    destination: str
    uuid: str
    delivery: int | None
    attempt: int
    development: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """Return the ids as log fields."""
        return {name: getattr(self, name) for name in _IDS}


_IDS: Final = ("handler", "destination", "uuid", "delivery", "attempt")
# Names that each line already has, or that the logger reserves.
_RESERVED: Final = frozenset(
    {
        *_IDS,
        "args",
        "at",
        "dropped",
        "dropped_fields",
        "error_class",
        "event",
        "exc_info",
        "extra",
        "frames",
        "level",
        "logger",
        "more",
        "positional_args",
        "self",
        "stack_info",
        "stacklevel",
    }
)


def line(level: str, given: Mapping[str, Any], current: RunIds | None) -> Log:
    """Return the line in printable form. `current`: the current run, for a line without ids of its own."""
    fields = dict(given)
    event = fields.pop("event", "")
    raised = fields.pop("exc_info", None)
    fields.pop("stack_info", None)
    bound = fields.pop(RUN, None)
    run = bound if isinstance(bound, RunIds) else current
    kept = {
        name: str(value) if isinstance(value, UUID) else value
        for name, value in fields.items()
        if name not in _RESERVED and log_redaction.printable(name, value)
    }
    dropped = fields.keys() - kept.keys()
    if bound is not None and not isinstance(bound, RunIds):
        dropped |= {RUN}
    exc = sys.exc_info()[1] if raised is True else raised
    if isinstance(exc, BaseException):
        outcome = retry_policy.outcome_of(exc)
        kept |= {"error_class": outcome.error_class, "frames": list(outcome.frames)}
    named = tuple(sorted(name for name in dropped if log_redaction.FIELD_NAME.fullmatch(name)))
    return Log(
        level=level,
        event=event if isinstance(event, str) and log_redaction.EVENT.fullmatch(event) else log_redaction.UNNAMED,
        fields=kept | (run.fields if run is not None else {}),
        dropped=len(dropped),
        names=named if run is not None and run.development else (),
    )
