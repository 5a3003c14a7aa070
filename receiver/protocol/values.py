"""The base class of values that are made for every request: a msgspec.Struct takes half the time of a dataclass.

Must not contain rules.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """An immutable value. `hidden`: fields that repr() omits, because they are secret or may be a patient's data."""

    hidden: ClassVar[frozenset[str]] = frozenset()

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({shown})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Return the fields for rich, which formats tracebacks."""
        return [(name, getattr(self, name)) for name in self.__struct_fields__ if name not in self.hidden]
