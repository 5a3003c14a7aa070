"""The options of `credential add`, from the descriptions of the kinds, and their conversion to settings.

Must not register a credential, nor contain a kind's name: see receiver.protocol.verification.
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
from receiver.protocol.verification.kind import CredentialOption

_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)


def _second_secret_option(kind: str) -> str | None:
    """Return the option with the file of a kind's second secret."""
    second = KINDS[kind].second_secret
    return None if second is None else f"{second}_file"


def _kinds_by_option() -> dict[CredentialOption, list[str]]:
    """Return each option, with the kinds that take it. Raises ValueError if two kinds' options have the same name."""
    found: dict[CredentialOption, list[str]] = {}
    for name, kind in KINDS.items():
        for use in kind.options:
            found.setdefault(use.option, []).append(name)
        if (second := _second_secret_option(name)) is not None:
            text = f"file with the {second.removesuffix('_file').replace('_', ' ')}."
            found.setdefault(CredentialOption(name=second, help=text, file=True), []).append(name)
    if len({option.name for option in found}) != len(found):
        raise ValueError("two kinds of credentials have different options with the same name")
    return found


def _type(option: CredentialOption) -> Any:
    if option.choices:
        return click.Choice(list(option.choices))
    if option.bounds is not None:
        return click.IntRange(*option.bounds)
    if option.duration:
        return Span()
    return _FILE if option.file else None


def _click_option(option: CredentialOption, kinds: list[str]) -> Any:
    arguments: dict[str, Any] = (
        {"is_flag": True}
        if option.flag
        else {"type": _type(option), "multiple": option.multiple, "metavar": "FILE" if option.file else option.metavar}
    )
    return click.option(option.flag_name, option.name, help=f"{', '.join(kinds)}: {option.help}", **arguments)


_KINDS_BY_OPTION: Final = {option.name: kinds for option, kinds in _kinds_by_option().items()}

kind_options = options(
    click.option(
        "--kind",
        type=click.Choice(list(KINDS)),
        required=True,
        help="; ".join(f"{name}: {each.text}" for name, each in KINDS.items()) + ".",
    ),
    *(_click_option(option, kinds) for option, kinds in _kinds_by_option().items()),
)


def settings(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert options to settings. Raises UsageError for an option that the kind does not take, or lacks."""
    chosen = {name: value for name, value in given.items() if value not in (None, (), False)}
    for name in chosen:
        if kind not in _KINDS_BY_OPTION[name]:
            raise click.UsageError(
                f"--{name.replace('_', '-')} is not valid for --kind {kind}: it belongs to "
                f"{', '.join(_KINDS_BY_OPTION[name])}"
            )
    for use in KINDS[kind].options:
        if use.required and use.option.name not in chosen:
            raise click.UsageError(f"--kind {kind} requires {use.option.flag_name}")
    try:
        return KINDS[kind].from_options({name: _value(value) for name, value in chosen.items()})
    except ConfigurationError as exc:
        raise click.UsageError(str(exc)) from None


def second_secret(kind: str, given: Mapping[str, Any]) -> str | None:
    """Return the second line of the secret, from the file that an option names. Raises click.BadParameter."""
    path = given.get(_second_secret_option(kind) or "")
    return None if path is None else read_secret(path)


def _value(value: Any) -> Any:
    """Return the value of an option in the form that a kind takes (see CredentialOption)."""
    if isinstance(value, Path):
        return value.read_bytes().decode("utf-8", "replace")
    return int(value.total_seconds()) if isinstance(value, timedelta) else value
