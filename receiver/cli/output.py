"""What commands print: a table for people, or one JSON document; progress on a terminal.

May not let a stored text act on a terminal: whatever is not plainly printable (control characters, ANSI sequences,
writing that changes direction) is shown escaped. JSON escapes it by itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import click
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# What fits every terminal and every ticket that an operator pastes a table into.
WIDTH: Final = 100


def document(value: Any) -> None:
    """Print `value` as one JSON document: times ISO 8601 UTC, bytes in hexadecimal."""
    click.echo(json.dumps(_plain(value), indent=2))


def rows(found: Sequence[Mapping[str, Any]], columns: Sequence[str], *, as_json: bool, nothing: str) -> None:
    """Print rows: all of their columns as a JSON array, or `columns` of them, those that say anything, as a table.

    `nothing` is said where there are none.
    """
    if as_json:
        document(found)
        return
    if not found:
        click.echo(nothing)
        return
    console = _console()
    cells = {name: [cell(row[name]) for row in found] for name in columns}
    told = [name for name in columns if any(cells[name])]
    rigid = {name for name in told if any(isinstance(row[name], datetime | int) for row in found)}
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name, width in _widths({name: [name, *cells[name]] for name in told}, rigid, console.width).items():
        shown.add_column(name, overflow="fold", width=width)
    for place, row in enumerate(found):
        shown.add_row(*(Text(cells[name][place], style=_STYLES.get(str(row[name]), "")) for name in told))
    console.print(shown)


def _widths(texts: Mapping[str, Sequence[str]], rigid: Collection[str], room: int) -> dict[str, int]:
    """The width of each column: as its longest text wants, but where there is no room for all the widest give way.

    Numbers and times, `rigid`, do not: folded they cannot be read.
    """
    widths = {name: max(map(cell_len, each)) for name, each in texts.items()}
    room -= len(widths) * 2 - 2  # what stands between columns
    flexible = [name for name in widths if name not in rigid] or list(widths)
    while sum(widths.values()) > room:
        widest = max(flexible, key=lambda name: widths[name])
        if widths[widest] == 1:
            break
        widths[widest] -= 1
    return widths


def row(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print one row: an object as JSON, or a line a column."""
    if as_json:
        document(found)
        return
    shown = Table(box=None, show_header=False, pad_edge=False)
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in found.items():
        shown.add_row(name, Text(cell(value), style=_STYLES.get(str(value), "")))
    _console().print(shown)


def cell(value: Any) -> str:
    """A value as a table shows it, safe on a terminal."""
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
    r"""`text` with everything that is not plainly printable written as `\x1b`, `\u202e`."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def say(text: str) -> None:
    """Tell an operator something beside the result: on stderr, so that stdout is the result alone."""
    click.echo(text, err=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr while the block runs, where that is a terminal; yields what moves it on by so many."""
    bar = Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    task = bar.add_task(what, total=total)
    with bar:
        yield lambda done: bar.advance(task, done)


_STYLES: Final = {"dead": "red", "held": "red", "quarantined": "yellow", "paused": "yellow", "refused": "red",
                  "succeeded": "green", "running": "green"}


def _console() -> Console:
    console = Console()
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    return console


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
