"""Load failures: why a plugin could not be loaded, with the part of it that logs may hold."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from typing import Final

from receiver.errors import ConfigurationError
from receiver.retry_policy import class_name

# Exceptions whose text holds only module names, identifiers and line numbers. The text of any other exception may quote
# a setting, for example a password: it is shown on the operator's terminal, but never written to a log.
_TEXT_IS_CODE: Final = (ImportError, SyntaxError, NameError, AttributeError)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadFailure:
    """A plugin that could not be loaded. `handler` is None for a module of RECEIVER_HANDLERS.

    `place`: module:line or file:line in the plugin's code, if known. `message`: the full error text, for a terminal.
    `summary`: the part that logs and the database may hold. `ended`: its import ended the process, or took too long.
    """

    handler: str | None
    origin: str
    error_class: str
    summary: str
    message: str = field(repr=False)
    place: str | None = None
    ended: bool = False


class PluginError(ConfigurationError):
    """A plugin cannot be loaded."""

    def __init__(self, failure: LoadFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def import_failure(exc: BaseException, name: str | None, origin: str) -> LoadFailure:
    """Make the LoadFailure of an import that raised. `name`: the handler, None for a module."""
    kind, place = class_name(exc), _place(exc)
    if isinstance(exc, ConfigurationError):
        return failure_of(name, origin, kind, f"{origin}: {exc}", place=place)
    # The text of a SyntaxError repeats the place.
    text = exc.msg if isinstance(exc, SyntaxError) else str(exc)
    begin = f"{origin} cannot be imported: {kind}"
    end = f" ({place})" if place else ""
    return LoadFailure(
        handler=name,
        origin=origin,
        error_class=kind,
        place=place,
        message=f"{begin}: {text}{end}",
        summary=(f"{begin}: {text}" if isinstance(exc, _TEXT_IS_CODE) else begin) + end,
    )


def failure_of(
    name: str | None, origin: str, kind: str, message: str, *, place: str | None = None, ended: bool = False
) -> LoadFailure:
    """Make a LoadFailure whose message is written by the receiver, so that logs may show it."""
    return LoadFailure(
        handler=name, origin=origin, error_class=kind, place=place, message=message, summary=message, ended=ended
    )


def _place(exc: BaseException) -> str | None:
    """Return the place of the error in the plugin: module:line, or file:line for a syntax error."""
    if isinstance(exc, SyntaxError):
        return f"{exc.filename}:{exc.lineno}" if exc.filename else None
    for frame, line in reversed(list(traceback.walk_tb(exc.__traceback__))):
        module = str(frame.f_globals.get("__name__", "?"))
        if not module.startswith(("importlib", "receiver.handlers")):
            return f"{module}:{line}"
    return None


def module_origin(module: str) -> str:
    """Return the origin of the handlers of a module, for display."""
    return f"module {module} of RECEIVER_HANDLERS"
