"""Which kinds a handler asks for: `Model.Event`, `Model.*`, `FHIR.*`, `*`.

Must not know handlers: strings in, booleans out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_PATTERN: Final = re.compile(r"\*|[A-Za-z][A-Za-z0-9_-]*\.(?:\*|[A-Za-z][A-Za-z0-9_-]*)")


def normalise_pattern(pattern: str) -> str:
    """The pattern with spaces removed, as kinds are ("Clinical Summary.PatientPush").

    Raises ValueError when it is not one of `Model.Event`, `Model.*`, `FHIR.*`, `*`.
    """
    compact = pattern.replace(" ", "")
    if not _PATTERN.fullmatch(compact):
        raise ValueError(f"{pattern!r} is not a valid pattern: use Model.Event, Model.*, FHIR.* or *")
    return compact


def matches(patterns: Iterable[str], kind: str) -> bool:
    """Whether one of the normalised patterns names `kind`."""
    model = kind.partition(".")[0]
    return any(pattern in (kind, "*") or pattern == f"{model}.*" for pattern in patterns)
