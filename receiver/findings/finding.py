"""A finding: a condition that needs an operator, with the command that fixes it.

Must not query anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from receiver.findings.codes import CODES

Severity = Literal["error", "warning"]

_PROGRAM: Final = "redox-receiver"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One finding.

    `code` is stable and listed in `receiver.findings.codes`. `text` is one sentence for operators, without patient
    data. `fix` is the command to run. `destination` is a name, or None for the whole installation. `details` are the
    values in the text (counts, times, names), for `--json`. An error makes `status` exit with 1; a warning does not.
    """

    code: str
    text: str
    fix: str
    destination: str | None = None
    severity: Severity = "error"
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise KeyError(self.code)


def command(*words: str) -> str:
    """Return a redox-receiver command, quoted for a shell: its names may come from outside. `…` marks what the operator
    fills in.
    """
    return " ".join((_PROGRAM, *(word if word == "…" else shlex.quote(word) for word in words)))
