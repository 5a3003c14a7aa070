"""What of a plugin's log line may be printed. The rule is in the docstring of receiver.handlers.Context.

Fields are judged by their value (receiver.logs.printable), for nobody knows what a plugin's keys mean. The ids of the
run are the receiver's: a field of such a name is dropped. Must not print anything itself.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from receiver import logs, retry_policy
from receiver.worker.handler_process.ipc import Log

# Under this key a line carries the ids of its run; what else stands there is a field of the plugin's.
RUN: Final = "_run"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIds:
    """The ids that each line of a run carries. `development`: of a development destination."""

    handler: str
    destination: str
    uuid: str
    delivery: int | None
    attempt: int
    development: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """As they are printed."""
        return {name: getattr(self, name) for name in _IDS}


_IDS: Final = ("handler", "destination", "uuid", "delivery", "attempt")
# Names that a line has already, or that the logger gives a meaning.
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
    """The line as it may be printed. `current`: the run that is going on, for a line that does not say whose it is."""
    fields = dict(given)
    event = fields.pop("event", "")
    raised = fields.pop("exc_info", None)
    fields.pop("stack_info", None)
    bound = fields.pop(RUN, None)
    run = bound if isinstance(bound, RunIds) else current
    kept = {
        name: str(value) if isinstance(value, UUID) else value
        for name, value in fields.items()
        if name not in _RESERVED and logs.printable(name, value)
    }
    dropped = fields.keys() - kept.keys()
    if bound is not None and not isinstance(bound, RunIds):
        dropped |= {RUN}
    exc = sys.exc_info()[1] if raised is True else raised
    if isinstance(exc, BaseException):
        outcome = retry_policy.of(exc)
        kept |= {"error_class": outcome.error_class, "frames": list(outcome.frames)}
    named = tuple(sorted(name for name in dropped if logs.FIELD_NAME.fullmatch(name)))
    return Log(
        level=level,
        event=event if isinstance(event, str) and logs.EVENT.fullmatch(event) else logs.UNNAMED,
        fields=kept | (run.fields if run is not None else {}),
        dropped=len(dropped),
        names=named if run is not None and run.development else (),
    )
