"""Every file and directory that a document names exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
DOCUMENTS: Final = sorted([*ROOT.glob("*.md"), *(ROOT / "deploy").glob("*.md"), *(ROOT / "tests").glob("*/*.md")])
# Where a path in a document may start.
_BASES: Final = (ROOT, ROOT / "receiver", ROOT / "deploy")
# A path from the root of the tree, a file with a usual ending, or a directory with a slash at its end. Never a part
# of a URL or of an absolute path.
_NAMED: Final = re.compile(
    r"""(?<![\w./<$:~-])(?:\./)?(
        (?:receiver|tests|deploy|migrations|\.ci)/[\w./-]*\w
        | (?:[\w.-]+/)*[\w.-]+\.(?:py|md|sh|sql|conf|lua|js)
        | (?:[\w.-]+/)+
    )(?![\w/<])""",
    re.VERBOSE,
)
_PLACEHOLDERS: Final = ("NNNN", "KIND")


@cache
def _names() -> frozenset[str]:
    """Return the names of all files and directories of the tree."""
    rooms = ("receiver", "tests", "deploy", "migrations")
    return frozenset(
        path.name
        for place in (ROOT.glob("*"), *((ROOT / room).rglob("*") for room in rooms))
        for path in place
        if "node_modules" not in path.parts and "__pycache__" not in path.parts
    )


def missing(text: str, directory: Path) -> Iterator[str]:
    """Yield the paths in a document in `directory` that do not exist. A bare name may be of any file."""
    for named in _NAMED.findall(text):
        path = named.rstrip("/")
        if any(each in path for each in _PLACEHOLDERS) or any((base / path).exists() for base in (*_BASES, directory)):
            continue
        if "/" in path or path not in _names():
            yield named


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_paths_exist(document: Path) -> None:
    """A path in prose, a table, a link or an example leads somewhere."""
    assert [*missing(document.read_text(), document.parent)] == []


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("`receiver/pipeline.py` and `web/endpoint.py`, see [x](deploy/OPERATING.md)", []),
        ("`pipeline.py` in `verification/`, `./tests/run`, `tests/`", []),
        ("https://redox.example/docs/index.md and /var/lib/nothing.py", []),
        ("`receiver/gone.py`", ["receiver/gone.py"]),
        ("`.ci/run` and `tests/gone/run`", ["tests/gone/run"]),
        ("`gone.py` and `no_such_room/`", ["gone.py", "no_such_room/"]),
        ("[x](deploy/GONE.md)", ["deploy/GONE.md"]),
    ],
)
def test_a_missing_path_is_found(text: str, gone: list[str]) -> None:
    """The reader of documents finds what does not exist, and nothing else."""
    assert [*missing(text, ROOT)] == gone


def test_architecture_names_every_room() -> None:
    """ARCHITECTURE.md has a row for each directory and each module at the top of the package."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rooms = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "receiver").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    storage = {f"storage/{path.parent.name}/" for path in (ROOT / "receiver" / "storage").glob("*/__init__.py")}
    wanted = (rooms | storage) - {"storage/", "__init__.py", "__main__.py"}
    assert {room for room in wanted if f"`{room}`" not in text} == set()
