"""Each class of the package has a name of its own: a name stands for one thing."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path
from typing import Final

import receiver

_PACKAGE: Final = Path(receiver.__file__).parent


def _classes() -> dict[str, list[str]]:
    """Return where each class is defined, by its name without leading underscores."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(_PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef):
                found[node.name.lstrip("_")].append(f"{path.relative_to(_PACKAGE.parent)}:{node.lineno}")
    return found


def test_each_class_has_its_own_name() -> None:
    """Two classes, exceptions included, never share a name, whatever file they are in."""
    assert {name: places for name, places in _classes().items() if len(places) > 1} == {}


def test_unavailable_is_one_exception() -> None:
    """There is one `Unavailable`, in the tree of errors."""
    assert [place.partition(":")[0] for place in _classes()["Unavailable"]] == ["receiver/errors.py"]
