"""The variables of the settings: misspelled names, and the text of `.env.example`."""

from __future__ import annotations

import difflib
import os
import textwrap
from collections.abc import Iterable
from typing import Final

import structlog
from pydantic.fields import FieldInfo

from receiver.settings import ASSIGNED, ENV_FILE, PREFIX, Settings, env_file, names_of, variable

log: Final = structlog.get_logger(__name__)


def unread(names: Iterable[str]) -> list[str]:
    """The names with our prefix that are not settings: probably misspelled."""
    read = {name for field in Settings.model_fields for name in names_of(field)} | {ENV_FILE}
    return sorted(name for name in names if name.upper().startswith(PREFIX) and name.upper() not in read)


def misspelled() -> str | None:
    """The variables of the environment and the .env file that nothing reads, each with the one that may be meant.

    None if there are none. Raises ConfigurationError if the named .env file does not exist.
    """
    known = [variable(field) for field in Settings.model_fields]
    file = env_file(os.environ)
    written = ASSIGNED.findall(file.read_text(errors="replace") if file.is_file() else "")
    given = set(os.environ) | {name for name, _ in written}
    meant = {name: difflib.get_close_matches(name, known, 1) for name in unread(given)}
    return ", ".join(name + "".join(f" ({each}?)" for each in near) for name, near in meant.items()) or None


def warn_of_unread() -> None:
    """Log the variables that nothing reads."""
    if found := misspelled():
        log.warning("settings.unread", error=f"nothing reads {found}: correct the name; .env.example lists them all")


def render_example() -> str:
    """The text of `.env.example`: every variable with its description and default."""
    head = (
        "Every variable that redox-receiver reads, with its default. Copy this to .env in the data directory "
        f"(chmod 600), or anywhere and name it in {ENV_FILE}. What stands in the environment goes before it."
    )
    parts = [_comment(head)]
    for name, field in Settings.model_fields.items():
        default = field.default
        value = ",".join(default) if isinstance(default, tuple) else default
        shown = "" if field.default_factory is not None or value is None else value
        parts.append(f"{_comment(f'{field.description}{_bounds(field)}')}\n#{variable(name)}={shown}")
    return "\n\n".join(parts) + "\n"


def _comment(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="# ", subsequent_indent="# ", break_long_words=False)


def _bounds(field: FieldInfo) -> str:
    words = [
        f"{word} {getattr(each, name)}"
        for each in field.metadata
        for name, word in (("ge", "at least"), ("le", "at most"))
        if hasattr(each, name)
    ]
    return f" ({', '.join(words)})" if words else ""
