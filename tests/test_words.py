"""Words that readers stumbled over are not used in prose, names and documents."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[1]
SOURCES: Final = sorted(
    {ROOT / "wsgi.py"}
    | {path for room in ("receiver", "migrations", "tests", "deploy") for path in (ROOT / room).rglob("*.py")}
    - {Path(__file__).resolve()}  # it lists the words
)
DOCUMENTS: Final = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "deploy").glob("*.md"),
        ROOT / ".env.example",
        *(ROOT / "deploy").glob("*.conf*"),
        ROOT / "deploy" / "quickstart",
    ]
)

# A pattern → what to write instead.
WORDS: Final = {
    r"\bwho(?:so)?ever\b": "name the person or process",
    r"\b(?:of|by|to|from|for|with|and|or|than|tells|asks|lets) who\b": "name the person or process",
    r"(?:^|[.;:] )Who\b[^?\n]*$": "name the person or process",
    r"\bhimself\b": "use `they` or a passive",
    r"(?<!here )\bis none\b": "`there is none`, or `is not a …`",
    r"(?<!here )\b(?:is|are) no (?!longer\b|more\b|way\b|need\b|matter\b)[a-z]+": "`is not a valid …`, `there is no …`",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\bbeside\b": "`in addition to`, `next to`, `with`",
    r"\bas ever\b": "`as before`",
    r"\bin vain\b": "`without success`",
    r"\bended so\b": "`by outcome`",
    r"\bof this sort\b": "name it",
    r"\bamid\b": "`during`, `in`",
    r"\bhasten": "flush",
    r"\bthe doors?\b|\b(?:flask|asgi|token) doors?\b": "endpoint, or server mode",
    r"^\s*May not\b": "`Must not …`: `May not` reads as a permission or a doubt",
}
# Capitals count: `is None` is Python, and `who` may have a noun before it.
CASED: Final = {pattern for pattern in WORDS if re.search("none|Who|May", pattern)}
# Names of variables, attributes and arguments.
NAMES: Final = {
    "told": "message",
    "said": "message, text",
    "mend": "fix",
    "mends": "fixes",
    "hasten": "flush",
    "patience": "timeout",
    "beside": "temporary, extra",
}


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of everything in a source file that a person reads: comments and strings."""
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
                for offset, line in enumerate(token.string.splitlines()):
                    yield token.start[0] + offset, line.strip("\"'# ")


def names(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that a source file names."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        match node:
            case (
                ast.Name(id=name)
                | ast.arg(arg=name)
                | ast.Attribute(attr=name)
                | ast.keyword(arg=str(name))
                | ast.FunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.AsyncFunctionDef(name=name)
            ):
                yield node.lineno, name.lstrip("_").lower()


def faults(where: str, line: int, text: str) -> Iterator[str]:
    """What is to be written otherwise in a line."""
    for pattern, instead in WORDS.items():
        for found in re.finditer(pattern, text, 0 if pattern in CASED else re.IGNORECASE):
            yield f"{where}:{line}: {found[0]!r}: write {instead}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources(path: Path) -> None:
    """Comments, docstrings, help, errors and names use standard terms."""
    where = str(path.relative_to(ROOT))
    found = [fault for line, text in prose(path) for fault in faults(where, line, text)]
    found += [f"{where}:{line}: name {name!r}: write {NAMES[name]}" for line, name in names(path) if name in NAMES]
    assert found == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents(path: Path) -> None:
    """Documents use standard terms."""
    where = str(path.relative_to(ROOT))
    found = [fault for line, text in enumerate(path.read_text().splitlines(), 1) for fault in faults(where, line, text)]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "Whoever reads it",
        "Who starts gunicorn takes this.",
        "told by who asks",
        "'x' is no time",
        "mend it",
        "beside the ledger",
        "May not know a framework.",
        "the ASGI door",
    ],
)
def test_words_are_found(text: str) -> None:
    """A sentence with one of the words is found."""
    assert [*faults("x", 1, text)]


@pytest.mark.parametrize(
    "text",
    [
        "Must not know a framework.",
        "It is no longer needed.",
        "the operator who acts",
        "Who is that?",
        "A row that may not be there.",
        "is None",
    ],
)
def test_plain_sentences_pass(text: str) -> None:
    """A plain sentence is not."""
    assert [*faults("x", 1, text)] == []
