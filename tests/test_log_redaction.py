"""Log redaction: each line is one JSON object, with allowed fields and values only."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import receiver
from receiver.log_redaction import FIELDS, printable
from tests.support.log_lines import PREAMBLE, printed


def test_a_line() -> None:
    """A line has time, level, logger, event and its fields. Lines below the level are not written."""
    [line] = printed("log.info('message.accepted', uuid='u', status=200); log.debug('message.accepted')")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("at"))
    assert line == {"level": "info", "logger": "receiver.test", "event": "message.accepted", "uuid": "u", "status": 200}


def test_unknown_fields_are_counted() -> None:
    """A field that is not on the list is counted, not printed."""
    [line] = printed("log.bind(token='CANARY').info('message.accepted', body=b'CANARY', uuid='u')")
    assert (line["dropped"], line["uuid"]) == (2, "u")
    assert "CANARY" not in json.dumps(line)


@pytest.mark.parametrize("event", ["'accepted CANARY'", "'accepted'", "7", "'a.b\\n'", "'A.b'", "'m.CANARY'"])
def test_events_are_fixed_words(event: str) -> None:
    """An event that does not have the form of a name is not printed: it was built from data."""
    [line] = printed(f"log.info({event})")
    assert line["event"] == "log.unnamed"
    assert "CANARY" not in json.dumps(line)


def test_values_are_plain() -> None:
    """Values are numbers, short texts and lists of them; of other values the type is printed."""
    [line] = printed(
        "log.info('a.b', uuid='x' * 1000, status=1.5, error=object(), part={'a': 1}, count=None, "
        "lanes=['a', b'c', ('d',)], row=True)"
    )
    assert (len(line["uuid"]), line["status"], line["error"], line["part"]) == (501, 1.5, "object", "dict")
    assert (line["count"], line["lanes"], line["row"]) == (None, ["a", "bytes", ["d"]], True)


def test_nothing_for_a_terminal() -> None:
    """Control characters, line separators and direction marks are escaped."""
    hostile = "\x1b[31m\r\n\x00\x7f\u2028\u2029\u202e\u2066\x85é\ud800"
    [line] = printed(f"log.info('a.b', uuid={hostile!a})")
    assert line["uuid"] == hostile


def test_exceptions() -> None:
    """Of an exception its class, the classes of its causes, and our own frames are printed; never its text."""
    [line] = printed("""
from receiver.keyring import load_keyring
from pathlib import Path
try:
    try:
        load_keyring(Path("/nowhere/CANARY"))
    except Exception as exc:
        raise ValueError("CANARY") from exc
except ValueError as exc:
    log.exception("a.b")
""")
    assert (line["error"], line["cause"]) == ("ValueError", ["ConfigurationError", "FileNotFoundError"])
    assert line["frames"] == []
    [line] = printed("""
from receiver.keyring import load_keyring
from pathlib import Path
try:
    load_keyring(Path("/nowhere/CANARY"))
except Exception as exc:
    log.error("a.b", error="known", exc_info=exc)
""")
    assert line["error"] == "known"
    assert [re.sub(r"\d+", "N", frame) for frame in line["frames"]] == ["receiver.keyring:N:load_keyring"]


@pytest.mark.parametrize(
    "name",
    [
        "sqlalchemy.engine",
        "alembic.env",
        "procrastinate.worker",
        "gunicorn.access",
        "gunicorn.error",
        "flask.app",
        "anybody",
    ],
)
def test_libraries(name: str) -> None:
    """Of a library's line the place and the class of its exception are printed; not its text, which may quote data."""
    [first, second] = printed(f"""
other = logging.getLogger({name!r})
other.warning("CANARY %s", "CANARY")
try:
    raise ValueError("CANARY")
except ValueError:
    other.exception("CANARY")
""")
    assert (first["event"], first["logger"], first["place"]) == ("library.line", name, "<string>:8:<module>")
    assert second["error"] == "ValueError"
    assert "CANARY" not in json.dumps([first, second])


def test_libraries_that_write_about_processes() -> None:
    """Lines that are about processes and revisions alone keep their text."""
    line = printed("""
import alembic.runtime.migration as place
place.log.info("Running %s %s -> %s", "upgrade", "", "0001", stacklevel=1)
record = logging.LogRecord("alembic.runtime.migration", 20, place.__file__, 1, "Running %s", ("upgrade",), None)
place.log.handle(record)
""")[-1]
    assert (line["event"], line["message"]) == ("library.line", "Running upgrade")


def test_a_line_that_cannot_be_made() -> None:
    """A library's line with wrong arguments prints none of them."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PREAMBLE + "logging.getLogger('alembic.runtime.migration')"
            ".handle(logging.LogRecord('alembic.runtime.migration', 20, 'migration.py', 1, "
            "'CANARY %d', ('CANARY',), None))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "CANARY" not in done.stderr


def _calls() -> list[tuple[str, ast.Call]]:
    """Every call of a structlog logger in the package, with its place."""
    package = Path(receiver.__file__).parent
    return [
        (f"{path.relative_to(package)}:{node.lineno}", node)
        for path in sorted(package.rglob("*.py"))
        if "structlog.get_logger" in path.read_text()
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("debug", "info", "warning", "error", "exception", "critical")
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "log"
    ]


def test_our_own_lines() -> None:
    """Every line of the package has a fixed event and fields from the list."""
    calls = _calls()
    assert len(calls) > 20
    used: set[str] = set()
    for where, call in calls:
        [event] = call.args
        for choice in (event.body, event.orelse) if isinstance(event, ast.IfExp) else (event,):
            assert isinstance(choice, ast.Constant), where
            assert re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", str(choice.value)), where
        used |= {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    assert used - {"exc_info"} <= FIELDS


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (7, True),
        (1.5, True),
        (True, True),
        (None, True),
        ("assigned", True),
        ("ward-4.b_2", True),
        ("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", True),
        ("Zoltana", False),
        ("no bed", False),
        ("1970-01-01", False),
        ("zoltana@example.org", False),
        ("x" * 41, False),
        ("", False),
        ("a\n", False),
        (1 << 70, False),
        (["a"], False),
        ({"a": 1}, False),
        (b"a", False),
    ],
)
def test_what_a_plugin_may_print(value: object, shown: bool) -> None:
    """A plugin's fields are judged by their value: numbers, booleans, None, UUIDs and words are printed."""
    assert printable("anything", value) is shown
    assert not printable("Zoltana Q", value)


def test_a_patients_lane() -> None:
    """In a patient's lane the code derived from the identifier is replaced by a short one, the same within a process
    and different in the next. Other lanes are printed as they are."""
    code = "0123456789abcdef" * 2
    source = (
        f"[log.info('a.b', lane='register/lab/patient:{code}') for _ in 'ab']; log.info('a.b', lane='x/lab/source:s')"
    )
    first, second = printed(source), printed(source)
    assert code[:8] not in json.dumps(first)
    assert re.fullmatch(r"register/lab/patient:~[0-9a-f]{8}", first[0]["lane"])
    assert first[0]["lane"] == first[1]["lane"] != second[0]["lane"]
    assert first[2]["lane"] == "x/lab/source:s"
