"""Logging: uncaught exceptions, and the limit for lines that requests cause."""

from __future__ import annotations

import json

from receiver import logs
from tests.support.log_lines import printed


def test_uncaught() -> None:
    """An uncaught exception, in any thread, is a JSON line too, without its text."""
    lines = printed(
        """
def fail():
    raise ValueError("CANARY")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
class Odd:
    def __del__(self):
        raise KeyError("CANARY")
Odd()
warnings.warn("CANARY")
fail()
""",
        status=1,
    )
    assert [line["event"] for line in lines] == [
        "process.uncaught",
        "process.uncaught",
        "library.line",
        "process.uncaught",
    ]
    assert [line.get("error") for line in lines] == ["ValueError", "KeyError", None, "ValueError"]
    assert "CANARY" not in json.dumps(lines)


FLOOD = """
handler, = logging.getLogger().handlers
web = structlog.get_logger("receiver.web.test")
def flood(n, log=web, **fields):
    for each in range(n):
        log.warning("request.unavailable", **fields, count=each)
"""


def test_lines_that_requests_cause_are_bounded() -> None:
    """Of each reason the first lines of a minute are written, and at the end of the process the count of the others."""
    lines = printed(FLOOD + "flood(1_000, reason='queue_full'); flood(3, reason='database_away')")
    full = [line for line in lines if line["reason"] == "queue_full"]
    assert [line.get("more") for line in full] == [None] * logs.LINES + [1_000 - logs.LINES]
    assert full[-1]["count"] == 999
    assert len(lines) == logs.LINES + 1 + 3


def test_the_count_is_written_at_the_end_of_the_minute() -> None:
    """The next line triggers it, or else a timer; then lines are written again."""
    lines = printed(
        FLOOD
        + """
import time
handler._counter.seconds = 0.2
flood(logs.LINES + 5)
handler._timer.join(30)
flood(logs.LINES + 6)
handler._counter._began -= 1
web.info("a.b")
flood(1)
"""
    )
    assert [line["more"] for line in lines if "more" in line] == [5, 6]
    assert [line["event"] for line in lines[-3:]] == ["request.unavailable", "a.b", "request.unavailable"]
    assert len(lines) == 2 * (logs.LINES + 1) + 2


def test_plugin_and_debug_lines_are_not_limited() -> None:
    """All lines of a plugin are written, and at level debug all lines of requests."""
    assert len(printed(FLOOD + "flood(200, log)")) == 200
    assert (
        len(
            printed(
                FLOOD.replace("web =", "logs.configure('debug'); web =")
                + "[web.debug('request.served') for _ in range(200)]"
            )
        )
        == 200
    )


def test_lines_of_libraries_are_limited_by_place() -> None:
    """And no exception is kept in memory until the count is written."""
    lines = printed(
        FLOOD
        + """
theirs = logging.getLogger("gunicorn.error")
for _ in range(logs.LINES + 5):
    try:
        1 / 0
    except ZeroDivisionError:
        theirs.exception("CANARY")
        web.exception("request.failed")
assert all(each.exc_info is None and "exc_info" not in str(each.msg) for each in handler._last.values())
"""
    )
    assert [(line["event"], line["more"], "error" in line) for line in lines[-2:]] == [
        ("library.line", 5, False),
        ("request.failed", 5, False),
    ]
    assert len(lines) == 2 * (logs.LINES + 1)


def test_a_forked_process_writes_its_own_count() -> None:
    """The child makes a new timer, because its parent's does not run there."""
    lines = printed(
        FLOOD
        + """
import os
flood(logs.LINES + 1)
if (child := os.fork()) == 0:
    flood(7)
    assert handler._timer.is_alive()
    logging.shutdown()
    os._exit(0)
os.waitpid(child, 0)
"""
    )
    assert sorted(line["more"] for line in lines if "more" in line) == [1, 8]
