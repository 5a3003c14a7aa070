"""Options and argument types that several commands share.

Must not access the database: an error here is wrong usage, exit status 2.
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

from receiver.cli import output

_Command = TypeVar("_Command", bound=Callable[..., Any])

_FOLD: Final = 92
# In characters. An audit row is never deleted.
_LONGEST_REASON: Final = 10_000
_STDIN: Final = "receiver.stdin"
_SPAN: Final = re.compile(r"(\d{1,6})([smhdw])")
_YEAR: Final = timedelta(days=365)
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class When(click.ParamType[datetime]):
    """A point in time: ISO 8601 (UTC without an offset), or a duration before now such as 15m, 2h, 3d, 2w.

    With `ahead`, the duration is after now.
    """

    name = "time"

    def __init__(self, *, ahead: bool = False) -> None:
        self._sign = 1 if ahead else -1

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Return the time, aware and in UTC."""
        if isinstance(value, datetime):
            return value
        span = _SPAN.fullmatch(value)
        try:
            if span is not None:
                return datetime.now(UTC) + self._sign * timedelta(**{_UNITS[span[2]]: int(span[1])})
            time = datetime.fromisoformat(value)
            return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a valid time: use ISO 8601, or a duration such as 15m, 2h, 3d", param, ctx)


class Span(click.ParamType[timedelta]):
    """A duration such as 30s, 15m, 2h, 3d, 2w."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Return the duration: above 0, and at most 365 days."""
        if isinstance(value, timedelta):
            return value
        span = _SPAN.fullmatch(value)
        found = timedelta() if span is None else timedelta(**{_UNITS[span[2]]: int(span[1])})
        if not timedelta() < found <= _YEAR:
            self.fail(f"{value!r} is not a valid duration: use one such as 15m, 2h, 3d, up to 365d", param, ctx)
        return found


class MessageId(click.ParamType["int | UUID"]):
    """The id or the UUID of a message."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | UUID:
        """Return an int for an id, and a UUID for a UUID."""
        if isinstance(value, int | UUID):
            return value
        try:
            return int(value) if value.isdecimal() and len(value) < 19 else UUID(value)
        except ValueError:
            self.fail(f"{value!r} is not a valid message id or UUID", param, ctx)


def options(*given: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Combine several options into one decorator. Help lists them in this order."""

    def put(command: _Command) -> _Command:
        for option in reversed(given):
            command = option(command)
        return command

    return put


def example(*lines: str) -> str:
    """The examples at the end of a command's help. A backslash continues a long line, as in a shell."""
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
    """Return stdin for the option `what`. Raises UsageError when another option has taken it."""
    meta = click.get_current_context().meta
    if _STDIN in meta:
        raise click.UsageError(f"{meta[_STDIN]} and {what} cannot both be read from stdin: use a file for one of them")
    meta[_STDIN] = what
    return sys.stdin.buffer


class Reason(click.ParamType[str]):
    """The operator's reason for the audit log. `-` reads it from stdin: other users can see arguments in `ps`."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the reason, without the newline at its end."""
        if value == "-":
            try:
                value = take_stdin("--reason").read().decode().strip()
            except UnicodeDecodeError:
                self.fail("stdin is not UTF-8 text", param, ctx)
        if len(value) > _LONGEST_REASON:
            self.fail(f"the reason is longer than {_LONGEST_REASON:,} characters: shorten it", param, ctx)
        if not value.strip():
            self.fail("the reason is empty: give one", param, ctx)
        return str(value)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
limit_option = click.option(
    "--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, metavar="N", help="Print at most N rows."
)
since_option = click.option(
    "--since",
    type=When(),
    metavar="TIME",
    help="Only since TIME (ISO 8601, or a duration before now such as 15m, 2h, 3d).",
)
until_option = click.option(
    "--until",
    type=When(),
    metavar="TIME",
    help="Only until TIME (ISO 8601, or a duration before now such as 15m, 2h, 3d).",
)
before_option = click.option(
    "--before", type=click.IntRange(1), metavar="ID", help="Only ids below ID, to get the next page."
)
destination_option = click.option("--destination", metavar="NAME", help="Filter by destination.")
list_options = options(before_option, limit_option, output.columns_option, json_option)
dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would change, and change nothing.")


def optional_reason_option(text: str = "Your reason", *, required: bool = False) -> Callable[[_Command], _Command]:
    """`--reason TEXT`, optional unless `required`."""
    return click.option(
        "--reason",
        required=required,
        type=Reason(),
        metavar="TEXT",
        help=f"{text}, stored encrypted in the audit log (-: stdin).",
    )


reason_option = optional_reason_option(required=True)


def correction_options(
    id_type: click.ParamType[Any] | type, *filters: Callable[[_Command], _Command]
) -> Callable[[_Command], _Command]:
    """The arguments and options of a command that corrects rows, which are selected by ids or by filters."""
    return options(
        click.argument("ids", metavar="[ID]...", type=id_type, nargs=-1),
        *filters,
        dry_run_option,
        reason_option,
        json_option,
    )


SECRET_FILE: Final = click.Path(dir_okay=False, allow_dash=True, path_type=Path)


def read_secret(path: Path) -> str:
    """Read a secret from a file, or from stdin for `-`, without the final newline. Raises click.BadParameter."""
    try:
        text = take_stdin("the secret").read().decode() if str(path) == "-" else path.read_text()
    except (OSError, UnicodeDecodeError):
        raise click.BadParameter(f"{path} cannot be read as text: check the file and its permissions") from None
    return text.removesuffix("\n").removesuffix("\r")


def nothing(filters: Mapping[str, object], empty: str) -> str:
    """The text for a list without rows: `empty`, or that nothing matches if there are filters."""
    if any(value not in (None, ()) for value in filters.values()):
        return "nothing matches these options: remove some to see more"
    return empty


def page_note(found: Sequence[Mapping[str, Any]], limit: int) -> None:
    """Print on stderr how to get the next page of a list that `limit` has cut."""
    if len(found) == limit:
        click.echo(f"for more rows, add --before {found[-1]['id']}", err=True)


@contextmanager
def open_new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file, mode 0600, and delete it if the block fails. Raises click.BadParameter."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as exc:
        raise click.BadParameter(f"{path} cannot be created: {exc.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextmanager
def new_file(path: Path | None, content: bytes) -> Iterator[None]:
    """Write a new file, mode 0600, before the block runs, and delete it if the block fails. None writes nothing.

    A secret is registered only after its file is written. Raises click.BadParameter.
    """
    if path is None:
        yield
        return
    with open_new_file(path) as file:
        file.write(content)
        file.flush()
        yield
