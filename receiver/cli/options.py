"""The options and kinds of arguments that several commands share.

May not touch the database: what is wrong here is wrong usage, exit status 2.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar
from uuid import UUID

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])

_FOLD: Final = 92
# An audit row is kept for ever.
_LONGEST_REASON: Final = 10_000
_STDIN: Final = "receiver.stdin"
_SPAN: Final = re.compile(r"(\d{1,6})([smhdw])")
_YEAR: Final = timedelta(days=365)
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class When(click.ParamType[datetime]):
    """A point in time: ISO 8601 (UTC unless it says otherwise), or a span from now such as 15m, 2h, 3d, 2w."""

    name = "time"

    def __init__(self, *, ahead: bool = False) -> None:
        self._sign = 1 if ahead else -1

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """The time, aware and in UTC."""
        if isinstance(value, datetime):
            return value
        span = _SPAN.fullmatch(value)
        try:
            if span is not None:
                return datetime.now(UTC) + self._sign * timedelta(**{_UNITS[span[2]]: int(span[1])})
            time = datetime.fromisoformat(value)
            return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time: write 2026-01-31T08:00, or a span such as 15m, 2h, 3d", param, ctx)


class Span(click.ParamType[timedelta]):
    """A duration such as 30s, 15m, 2h, 3d, 2w."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """The duration, more than nothing and a year at most."""
        if isinstance(value, timedelta):
            return value
        span = _SPAN.fullmatch(value)
        found = timedelta() if span is None else timedelta(**{_UNITS[span[2]]: int(span[1])})
        if not timedelta() < found <= _YEAR:
            self.fail(f"{value!r} is not a valid duration: use one such as 15m, 2h, 3d, up to 365d", param, ctx)
        return found


class MessageId(click.ParamType["int | UUID"]):
    """A message's id or its uuid."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | UUID:
        """An int for an id, a UUID for a uuid."""
        if isinstance(value, int | UUID):
            return value
        try:
            return int(value) if value.isdecimal() and len(value) < 19 else UUID(value)
        except ValueError:
            self.fail(f"{value!r} is neither the id nor the uuid of a message", param, ctx)


def options(*given: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Several options as one decorator, in the order in which help lists them."""

    def put(command: _Command) -> _Command:
        for option in reversed(given):
            command = option(command)
        return command

    return put


def example(*lines: str) -> str:
    """The end of a command's help: how it is used. Long lines are continued as a shell takes them."""
    head = "Example:" if len(lines) == 1 else "Examples:"
    return "\n".join(["\b", head, *(_folded(f"  redox-receiver {line}") for line in lines)])


def _folded(line: str) -> str:
    first, *others = line.split(" --")
    lines = [first]
    for each in others:
        if len(lines[-1]) + len(each) > _FOLD:
            lines[-1] += " \\"
            lines.append(f"     --{each}")
        else:
            lines[-1] += f" --{each}"
    return "\n".join(lines)


def take_stdin(what: str) -> BinaryIO:
    """Stdin, for `what`. Raises UsageError when the command has read it for something else."""
    meta = click.get_current_context().meta
    if _STDIN in meta:
        raise click.UsageError(f"{meta[_STDIN]} and {what} cannot both be read from stdin: put one of them in a file")
    meta[_STDIN] = what
    return sys.stdin.buffer


class Reason(click.ParamType[str]):
    """A person's words for the audit. `-` reads them from stdin: what stands on a command line, others see in `ps`."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The words, without the line's end."""
        if value == "-":
            try:
                value = take_stdin("--reason").read().decode().strip()
            except UnicodeDecodeError:
                self.fail("stdin is not UTF-8 text", param, ctx)
        if len(value) > _LONGEST_REASON:
            self.fail(f"a reason has at most {_LONGEST_REASON:,} characters", param, ctx)
        if not value.strip():
            self.fail("say why", param, ctx)
        return str(value)


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
limit_option = click.option(
    "--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, metavar="N", help="At most so many rows."
)
since_option = click.option(
    "--since", type=When(), metavar="TIME", help="Not before: an ISO 8601 time, or 15m, 2h, 3d ago."
)
until_option = click.option(
    "--until", type=When(), metavar="TIME", help="Not after: an ISO 8601 time, or 15m, 2h, 3d ago."
)
before_option = click.option(
    "--before", type=click.IntRange(1), metavar="ID", help="Only ids below: the next page of a list."
)
destination_option = click.option("--destination", metavar="NAME", help="Of this destination.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would happen, and do none of it.")


def optional_reason_option(
    says: str = "Why, in your words", *, required: bool = False
) -> Callable[[_Command], _Command]:
    """`--reason TEXT` where it is not always asked for."""
    return click.option(
        "--reason",
        required=required,
        type=Reason(),
        metavar="TEXT",
        help=f"{says}: kept in the audit, sealed. Use - to read it from stdin.",
    )


reason_option = optional_reason_option(required=True)
SECRET_FILE: Final = click.Path(dir_okay=False, allow_dash=True, path_type=Path)


def read_secret(path: Path) -> str:
    """The secret in a file, or on stdin for `-`, without the line's end. Raises click.BadParameter."""
    try:
        text = take_stdin("the secret").read().decode() if str(path) == "-" else path.read_text()
    except (OSError, UnicodeDecodeError):
        raise click.BadParameter(f"{path} cannot be read as text") from None
    return text.removesuffix("\n").removesuffix("\r")


def nothing(filters: Mapping[str, object], empty: str) -> str:
    """What a list without rows says: that nothing matches its filters, where some are given, else `empty`."""
    if any(value not in (None, ()) for value in filters.values()):
        return "nothing matches these options: leave some out to see more"
    return empty


def page_note(found: Sequence[Mapping[str, Any]], limit: int) -> None:
    """Say on stderr how a list goes on that was cut at `limit`."""
    if len(found) == limit:
        click.echo(f"more: --before {found[-1]['id']}", err=True)


@contextmanager
def new_file(path: Path | None, content: bytes) -> Iterator[None]:
    """Write a new file, mode 0600, before the block runs; take it back when the block fails. None: nothing is written.

    A secret that could not be written down is so never registered. Raises click.BadParameter.
    """
    if path is None:
        yield
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as exc:
        raise click.BadParameter(f"{path} cannot be made: {exc.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
