"""What a plugin says of a function with @handler or @responder, checked as soon as it is said.

May not find, load or run anything.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from receiver.errors import ConfigurationError
from receiver.protocol.message import QUERIES
from receiver.protocol.patterns import normalise_pattern

MAX_ATTEMPTS: Final = 10
TIMEOUT: Final = 60.0
# A lane stands still as long as one of its handlers runs.
_LONGEST_TIMEOUT: Final = 3600.0

# The name is part of the lanes' names and the name of a queue: PostgreSQL cuts a notification channel at 63 bytes, and
# Procrastinate puts 23 of its own before the queue.
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
    """The options of a handler or responder as its author wrote them, patterns normalised.

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
            raise ConfigurationError(f"{self.name!r} is no handler's name: use a-z, 0-9, - and _, at most 40 in all")
        object.__setattr__(self, "patterns", self._patterns())
        for option, choices in _CHOICES.items():
            if getattr(self, option) not in choices:
                raise self._wrong(f"{option}={getattr(self, option)!r}: choose {', '.join(map(repr, choices))}")
        if (self.ordering == "patient") != bool(self.patient_key):
            raise self._wrong('ordering="patient" and patient_key (a type of identifier, such as "MR") go together')
        if self.on_failure == "hold" and self.ordering == "none":
            raise self._wrong('on_failure="hold" holds back what comes after, and with ordering="none" nothing does')
        if self.max_attempts < 1:
            raise self._wrong("max_attempts is 1 or more")
        if not 0 < self.timeout <= _LONGEST_TIMEOUT:
            raise self._wrong(f"timeout is more than 0 and at most {_LONGEST_TIMEOUT:g} seconds")

    def _patterns(self) -> tuple[str, ...]:
        if not self.patterns:
            raise self._wrong("it asks for no kind of message")
        try:
            normal = tuple(dict.fromkeys(normalise_pattern(str(pattern)) for pattern in self.patterns))
        except ValueError as exc:
            raise self._wrong(str(exc)) from exc
        for pattern in normal:
            if self.role == "responder" and pattern not in QUERIES:
                raise self._wrong(f"{pattern} is no query of Redox's: a responder names queries in full")
            if self.role == "handler" and pattern in QUERIES:
                raise self._wrong(f"{pattern} is a query, which @responder answers: a handler gets none")
        return normal

    def _wrong(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"@{self.role} {self.name}: {why}")


def declare(declaration: Declaration) -> Callable[[_Function], _Function]:
    """The decorator that puts the declaration on a function. Raises ConfigurationError when it cannot be run."""

    def put(function: _Function) -> _Function:
        said = f"@{declaration.role} {declaration.name}"
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigurationError(f"{said}: a plain function is wanted, not an async one")
        try:
            inspect.signature(function).bind(None, None)
        except TypeError:
            raise ConfigurationError(f"{said}: the function is called with (message, context)") from None
        if declared(function) is not None:
            raise ConfigurationError(f"{said}: the function is declared already")
        setattr(function, _MARK, declaration)
        return function

    return put


def declared(thing: object) -> Declaration | None:
    """The declaration on a function; None on anything else."""
    found = getattr(thing, _MARK, None)
    return found if isinstance(found, Declaration) else None
