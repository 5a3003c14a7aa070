"""Patterns of message kinds that a handler subscribes to: `Model.Event`, `Model.*`, `FHIR.*`, `*`.

Must not know handlers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

_PATTERN: Final = re.compile(r"\*|[A-Za-z][A-Za-z0-9_-]*\.(?:\*|[A-Za-z][A-Za-z0-9_-]*)")


def normalize_pattern(pattern: str) -> str:
    """Return the pattern without spaces, like kinds ("Clinical Summary.PatientPush").

    Raises ValueError if it is not `Model.Event`, `Model.*`, `FHIR.*` or `*`.
    """
    compact = pattern.replace(" ", "")
    if not _PATTERN.fullmatch(compact):
        raise ValueError(f"{pattern!r} is not a valid pattern: use Model.Event, Model.*, FHIR.* or *")
    return compact


def matches(patterns: Iterable[str], kind: str) -> bool:
    """Return whether one of the normalized patterns matches `kind`."""
    model = kind.partition(".")[0]
    return any(pattern in (kind, "*") or pattern == f"{model}.*" for pattern in patterns)
