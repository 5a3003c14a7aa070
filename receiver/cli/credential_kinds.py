"""The options of `credential add`, as the kinds describe them, and what they say as settings.

Must not register anything, nor know a kind by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import click

from receiver.cli.options import Span, options, read_secret
from receiver.errors import ConfigurationError
from receiver.protocol.verification import KINDS
from receiver.protocol.verification.kind import Option

_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)


def _second(kind: str) -> str | None:
    """The option with the file of a kind's second secret."""
    second = KINDS[kind].second_secret
    return None if second is None else f"{second}_file"


def _options() -> dict[str, tuple[Option, list[str]]]:
    """Each option by its name, with the kinds that take it. Two kinds that take one take the same."""
    found: dict[str, tuple[Option, list[str]]] = {}
    for name, kind in KINDS.items():
        for each in kind.options:
            option, kinds = found.setdefault(each.option.name, (each.option, []))
            if option != each.option:
                raise ValueError(f"kind {name} has an option --{option.name} of its own, and {kinds[0]} another")
            kinds.append(name)
        if (second := _second(name)) is not None:
            says = f"the {second.removesuffix('_file').replace('_', ' ')} is in FILE."
            found.setdefault(second, (Option(name=second, help=says, metavar="FILE"), []))[1].append(name)
    return found


def _type(option: Option) -> Any:
    if option.choices:
        return click.Choice(list(option.choices))
    if option.bounds is not None:
        return click.IntRange(*option.bounds)
    if option.duration:
        return Span()
    return _FILE if option.file or option.metavar == "FILE" else None


def _option(option: Option, kinds: list[str]) -> Any:
    how: dict[str, Any] = (
        {"is_flag": True}
        if option.flag
        else {"type": _type(option), "multiple": option.multiple, "metavar": "FILE" if option.file else option.metavar}
    )
    return click.option(
        f"--{option.name.replace('_', '-')}", option.name, help=f"{', '.join(kinds)}: {option.help}", **how
    )


_TABLE: Final = _options()

kind_options = options(
    click.option(
        "--kind",
        type=click.Choice(list(KINDS)),
        required=True,
        help="; ".join(f"{name}: {each.says}" for name, each in KINDS.items()) + ".",
    ),
    *(_option(option, kinds) for option, kinds in _TABLE.values()),
)


def settings(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the options say. Raises UsageError for an option that is not of the kind, or is missing."""
    said = {name: value for name, value in given.items() if value not in (None, (), False)}
    for name in said:
        if kind not in _TABLE[name][1]:
            raise click.UsageError(f"--{name.replace('_', '-')} is of --kind {', '.join(_TABLE[name][1])}")
    for each in KINDS[kind].options:
        if each.needed and each.option.name not in said:
            raise click.UsageError(f"--kind {kind} needs --{each.option.name.replace('_', '-')}")
    said.pop(_second(kind) or "", None)
    try:
        return KINDS[kind].from_options({name: _plain(value) for name, value in said.items()})
    except ConfigurationError as exc:
        raise click.UsageError(str(exc)) from None


def second_secret(kind: str, given: Mapping[str, Any]) -> str | None:
    """The second line of the secret, out of the file that an option names. Raises click.BadParameter."""
    path = given.get(_second(kind) or "")
    return None if path is None else read_secret(path)


def _plain(value: Any) -> Any:
    """What an option's value is to a kind (see Option)."""
    if isinstance(value, Path):
        return value.read_bytes().decode("utf-8", "replace")
    return int(value.total_seconds()) if isinstance(value, timedelta) else value
