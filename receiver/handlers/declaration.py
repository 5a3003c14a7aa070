"""Declarations: the options that a plugin sets with @handler or @responder, validated at import.

Must not find, load or run anything.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from receiver.errors import ConfigurationError
from receiver.protocol.message import QUERIES
from receiver.protocol.patterns import normalize_pattern

MAX_ATTEMPTS: Final = 10
TIMEOUT: Final = 60.0
# Seconds. The lane is blocked while its handler runs.
_LONGEST_TIMEOUT: Final = 3600.0

# The name is part of lane names and of a queue name: PostgreSQL limits the name of a notification channel to 63 bytes,
# and Procrastinate adds a prefix of 23 bytes to the queue name.
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")
_CHOICES: Final = {
    "ordering": ("source", "patient", "none"),
    "acknowledge": ("after_commit", "after_handling"),
    "on_failure": ("dead", "hold"),
}
_MARK: Final = "__redox_receiver__"

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class Declaration:
    """The options of a handler or responder, with normalized patterns.

    Raises ConfigurationError.
    """

    role: str
    name: str
    patterns: tuple[str, ...]
    ordering: str = "source"
    patient_key: str | None = None
    acknowledge: str = "after_commit"
    on_failure: str = "dead"
    max_attempts: int = MAX_ATTEMPTS
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(str(self.name)):
            raise ConfigurationError(
                f"{self.name!r} is not a valid handler name: use a-z, 0-9, - and _, at most 40 characters"
            )
        object.__setattr__(self, "patterns", self._patterns())
        for option, choices in _CHOICES.items():
            if getattr(self, option) not in choices:
                raise self._wrong(
                    f"{option}={getattr(self, option)!r} is not valid: use one of {', '.join(map(repr, choices))}"
                )
        if (self.ordering == "patient") != bool(self.patient_key):
            raise self._wrong('set ordering="patient" and patient_key (an identifier type, such as "MR") together')
        if self.on_failure == "hold" and self.ordering == "none":
            raise self._wrong('on_failure="hold" has no effect with ordering="none": use another ordering')
        if self.max_attempts < 1:
            raise self._wrong("max_attempts must be 1 or more")
        if not 0 < self.timeout <= _LONGEST_TIMEOUT:
            raise self._wrong(f"timeout must be more than 0 and at most {_LONGEST_TIMEOUT:g} seconds")

    def _patterns(self) -> tuple[str, ...]:
        if not self.patterns:
            raise self._wrong("it has no pattern: name at least one kind of message")
        try:
            normal = tuple(dict.fromkeys(normalize_pattern(str(pattern)) for pattern in self.patterns))
        except ValueError as exc:
            raise self._wrong(str(exc)) from exc
        for pattern in normal:
            if self.role == "responder" and pattern not in QUERIES:
                raise self._wrong(f"{pattern} is not a query of Redox: use complete names, such as PatientSearch.Query")
            if self.role == "handler" and pattern in QUERIES:
                raise self._wrong(f"{pattern} is a query, which a handler never receives: use @responder")
        return normal

    def _wrong(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"@{self.role} {self.name}: {why}")


def declare(declaration: Declaration) -> Callable[[_Function], _Function]:
    """Return the decorator that attaches the declaration to a function.

    Raises ConfigurationError if the function cannot be called as a handler.
    """

    def attach(function: _Function) -> _Function:
        label = f"@{declaration.role} {declaration.name}"
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigurationError(f"{label}: the function must not be async")
        try:
            inspect.signature(function).bind(None, None)
        except TypeError:
            raise ConfigurationError(f"{label}: the function must accept (message, context)") from None
        if declared(function) is not None:
            raise ConfigurationError(f"{label}: the function already has a declaration")
        setattr(function, _MARK, declaration)
        return function

    return attach


def declared(thing: object) -> Declaration | None:
    """Return the declaration of a function, or None."""
    found = getattr(thing, _MARK, None)
    return found if isinstance(found, Declaration) else None
