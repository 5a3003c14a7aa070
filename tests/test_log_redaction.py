"""Log lines: one JSON object each, with nothing in it that was not meant to be."""

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
    """A line has time, level, logger, event and its fields; below the level there is none."""
    [line] = printed("log.info('message.accepted', uuid='u', status=200); log.debug('message.accepted')")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("at"))
    assert line == {"level": "info", "logger": "receiver.test", "event": "message.accepted", "uuid": "u", "status": 200}


def test_unknown_fields_are_counted() -> None:
    """A field that is not on the list is not printed, and that there was one is."""
    [line] = printed("log.bind(token='CANARY').info('message.accepted', body=b'CANARY', uuid='u')")
    assert (line["dropped"], line["uuid"]) == (2, "u")
    assert "CANARY" not in json.dumps(line)


@pytest.mark.parametrize("event", ["'accepted CANARY'", "'accepted'", "7", "'a.b\\n'", "'A.b'", "'m.CANARY'"])
def test_events_are_fixed_words(event: str) -> None:
    """What is no event's name was put together from data, and is not printed."""
    [line] = printed(f"log.info({event})")
    assert line["event"] == "log.unnamed"
    assert "CANARY" not in json.dumps(line)


def test_values_are_plain() -> None:
    """Values are numbers, short texts and lists of them; of anything else the type is told."""
    [line] = printed(
        "log.info('a.b', uuid='x' * 1000, status=1.5, error=object(), part={'a': 1}, count=None, "
        "lanes=['a', b'c', ('d',)], row=True)"
    )
    assert (len(line["uuid"]), line["status"], line["error"], line["part"]) == (501, 1.5, "object", "dict")
    assert (line["count"], line["lanes"], line["row"]) == (None, ["a", "bytes", ["d"]], True)


def test_nothing_for_a_terminal() -> None:
    """Control characters, line separators and direction marks come out as escapes."""
    hostile = "\x1b[31m\r\n\x00\x7f\u2028\u2029\u202e\u2066\x85é\ud800"
    [line] = printed(f"log.info('a.b', uuid={hostile!a})")
    assert line["uuid"] == hostile


def test_exceptions() -> None:
    """An exception is its class, those it came from, and our own frames; its text is nowhere."""
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
    """Of a library's line the place is told, and the class of its exception; not its text, which may quote anything."""
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


def test_libraries_that_speak_of_processes() -> None:
    """Lines that can tell of nothing but processes and revisions keep their text."""
    line = printed("""
import alembic.runtime.migration as place
place.log.info("Running %s %s -> %s", "upgrade", "", "0001", stacklevel=1)
record = logging.LogRecord("alembic.runtime.migration", 20, place.__file__, 1, "Running %s", ("upgrade",), None)
place.log.handle(record)
""")[-1]
    assert (line["event"], line["message"]) == ("library.line", "Running upgrade")


def test_a_line_that_cannot_be_made() -> None:
    """A library's mistake in its own line prints none of what was to go into it."""
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
    """Every call of a structlog logger in the package, with where it stands."""
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
    """Every line that the package writes has a fixed event, and fields that are on the list and not more."""
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
    """A plugin's fields are judged by their value: numbers, booleans, None, UUIDs and words, whatever their key."""
    assert printable("anything", value) is shown
    assert not printable("Zoltana Q", value)


def test_a_patients_lane() -> None:
    """Of a lane that is a patient's, the code derived from their identifier is replaced by a short one, the same for
    the whole process and another in the next; other lanes are printed as they are."""
    code = "0123456789abcdef" * 2
    source = (
        f"[log.info('a.b', lane='register/lab/patient:{code}') for _ in 'ab']; log.info('a.b', lane='x/lab/source:s')"
    )
    first, second = printed(source), printed(source)
    assert code[:8] not in json.dumps(first)
    assert re.fullmatch(r"register/lab/patient:~[0-9a-f]{8}", first[0]["lane"])
    assert first[0]["lane"] == first[1]["lane"] != second[0]["lane"]
    assert first[2]["lane"] == "x/lab/source:s"
