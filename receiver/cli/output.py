"""Output of commands: a table, or one JSON document; a progress bar on a terminal.

Must not let stored text control a terminal: control characters, ANSI sequences and bidirectional marks are escaped
(JSON escapes them itself). Must not wrap a line except on a terminal, and never within a word.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, TypeVar
from uuid import UUID

import click
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_Command = TypeVar("_Command", bound=Callable[..., Any])

_GAP: Final = 2  # between columns
_COLUMNS: Final = "receiver.columns"


def columns_option(command: _Command) -> _Command:
    """`--columns NAME,…` for a command that prints one list: `rows` shows these columns, in this order."""
    return click.option(
        "--columns",
        callback=_choose,
        expose_value=False,
        metavar="NAME[,NAME…]",
        help="Show only these columns, in this order. Choose from the columns that --json shows.",
    )(command)


def _choose(ctx: click.Context, _parameter: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.meta[_COLUMNS] = [name for name in value.replace(" ", "").split(",") if name]


def document(value: Any) -> None:
    """Print `value` as one JSON document: times as ISO 8601 in UTC, bytes as hexadecimal."""
    click.echo(json.dumps(_plain(value), indent=2))


def rows(found: Sequence[Mapping[str, Any]], columns: Sequence[str], *, as_json: bool, nothing: str) -> None:
    """Print rows: all columns as a JSON array, or those of `columns` that are not empty as a table.

    Prints `nothing` if there are no rows. The option --columns overrides `columns`, also in JSON. Raises UsageError
    for an unknown column.
    """
    chosen = _chosen(found)
    if as_json:
        document(found if chosen is None else [{name: each.get(name) for name in chosen} for each in found])
        return
    if not found:
        click.echo(nothing)
        return
    cells = {name: [cell(each.get(name)) for each in found] for name in chosen or columns}
    shown = {name: texts for name, texts in cells.items() if chosen or any(texts)} or cells
    widths = _widths({name: [name, *texts] for name, texts in shown.items()}, width())
    _line({name: name for name in widths}, widths, bold=True)
    click.echo("─" * (sum(widths.values()) + _GAP * (len(widths) - 1)))
    for place in range(len(found)):
        _line({name: shown[name][place] for name in widths}, widths)
    if hidden := [name for name in shown if name not in widths]:
        say(f"the terminal is too narrow for {', '.join(hidden)}: choose columns with --columns, or use --json")


def _chosen(found: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The columns that the operator chose, if any."""
    context = click.get_current_context(silent=True)
    chosen: list[str] | None = None if context is None else context.meta.get(_COLUMNS)
    if chosen is None or not found:
        return chosen
    known = list(dict.fromkeys(name for each in found for name in each))
    if unknown := [name for name in chosen if name not in known]:
        raise click.UsageError(f"--columns: unknown column {', '.join(unknown)}: choose from {', '.join(known)}")
    return chosen


def width() -> int | None:
    """The width of the terminal in columns; None if stdout is not a terminal, and lines may have any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _widths(texts: Mapping[str, Sequence[str]], available: int | None) -> dict[str, int]:
    """The width of each column: that of its longest text.

    If the terminal is too narrow, columns are wrapped at spaces, the widest first. If that is not enough, the last
    columns are left out. A word is never broken, so that an id can be copied.
    """
    widths = {name: max(map(cell_len, each)) for name, each in texts.items()}
    if available is None:
        return widths
    least = {name: max(cell_len(word) for text in each for word in text.split(" ")) for name, each in texts.items()}
    while len(least) > 1 and sum(least.values()) + _GAP * (len(least) - 1) > available:
        least.popitem()
    widths = {name: widths[name] for name in least}
    while sum(widths.values()) + _GAP * (len(widths) - 1) > available:
        flexible = [name for name in widths if widths[name] > least[name]]
        if not flexible:
            break  # one column with a word that is wider than the terminal
        widths[max(flexible, key=lambda name: widths[name])] -= 1
    return widths


def _line(cells: Mapping[str, str], widths: Mapping[str, int], *, bold: bool = False) -> None:
    """Print one row of a table, with as many lines as its tallest cell."""
    wrapped = {name: _wrapped(cells[name], widths[name]) for name in widths}
    colour = {name: _STYLES.get(text) for name, text in cells.items()}
    last = list(widths)[-1]
    for number in range(max(map(len, wrapped.values()))):
        pieces = []
        for name, lines in wrapped.items():
            text = lines[number] if number < len(lines) else ""
            pad = " " * (0 if name == last else widths[name] - cell_len(text) + _GAP)
            pieces.append(_styled(text, colour[name], bold=bold) + pad)
        click.echo("".join(pieces).rstrip())


def _wrapped(text: str, available: int) -> list[str]:
    """Wrap the text at spaces, into lines of at most `available` columns."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and cell_len(lines[-1]) + 1 + cell_len(word) > available:
            lines.append(word)
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _styled(text: str, colour: str | None, *, bold: bool = False) -> str:
    if not text or (colour is None and not bold) or os.environ.get("NO_COLOR"):
        return text
    return click.style(text, fg=colour, bold=bold or None)


def row(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print one row: as a JSON object, or with one line for each column."""
    if as_json:
        document(found)
        return
    label = max((len(name) for name in found), default=0)
    for name, value in found.items():
        text = cell(value)
        available = width()
        lines = [text] if available is None else _wrapped(text, available - label - _GAP)
        for number, line in enumerate(lines):
            begin = _styled(name, None, bold=True) + " " * (label - len(name)) if number == 0 else " " * label
            click.echo(f"{begin}{' ' * _GAP}{_styled(line, _STYLES.get(str(value)))}".rstrip())


def cell(value: Any) -> str:
    """Format a value for a table, safe for a terminal."""
    if isinstance(value, datetime):
        return _iso(value, "seconds")
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    if isinstance(value, dict):
        return ", ".join(f"{escaped(str(name))}={cell(each)}" for name, each in value.items() if each is not None)
    return escaped(str(value))


def escaped(text: str) -> str:
    r"""Escape everything in `text` that is not printable, as `\x1b` or `\u202e`."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def say(text: str) -> None:
    """Print a note on stderr. Stdout is for the result only."""
    click.echo(text, err=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr if it is a terminal. Yields the function that advances it by a number."""
    bar = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    task = bar.add_task(what, total=total)
    with bar:
        yield lambda done: bar.advance(task, done)


_STYLES: Final = {
    "dead": "red",
    "held": "red",
    "quarantined": "yellow",
    "paused": "yellow",
    "refused": "red",
    "succeeded": "green",
    "running": "green",
}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, datetime):
        return _iso(value, "microseconds")
    if isinstance(value, bytes | memoryview):
        return bytes(value).hex()
    return str(value) if isinstance(value, UUID) else value


def _iso(time: datetime, precision: str) -> str:
    return time.astimezone(UTC).isoformat(timespec=precision).removesuffix("+00:00") + "Z"
