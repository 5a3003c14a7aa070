"""Fail-points by themselves: what the variable may say, that each is passed somewhere, and that they are not there."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import receiver
from receiver import settings as table
from receiver.errors import ConfigurationError, Unavailable
from receiver.fault_injection import faults
from receiver.fault_injection.faults import POINTS, VARIABLE, FaultAction, FaultRegistry, FaultTriggered, parse

_PACKAGE = Path(receiver.__file__).parent


def _unavailable() -> str | None:
    raise Unavailable("the database does not answer")


def _armed(
    text: str, *, production: Callable[[], str | None] = lambda: None, cut: Callable[[], object] = lambda: None
) -> FaultRegistry:
    made = FaultRegistry()
    made.enable(text, production=production, cut=cut)
    return made


def test_what_the_variable_says() -> None:
    """An action for each point, with a chance, with the time that is meant, or each time; space does no harm."""
    assert parse(" ledger.committed=kill@0.02, lane.claimed=delay:0.5#3,door.judged = raise,,") == {
        "ledger.committed": FaultAction(action="kill", chance=0.02),
        "lane.claimed": FaultAction(action="delay", seconds=0.5, hit=3),
        "door.judged": FaultAction(action="raise"),
    }
    assert parse("") == {}


def test_every_mistake_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the mistakes of the other settings, so that nobody finds them one by one."""
    mistakes = (
        "nowhere=kill",
        "door.judged=explode",
        "door.queued",
        "door.body_read=raise@2",
        "lane.told=cut@0",
        "lane.left=kill#0",
        "lane.cut=kill",
        "lane.cut=raise",
        "lane.claimed=delay",
    )
    monkeypatch.setenv(VARIABLE, ",".join(mistakes))
    monkeypatch.setenv("RECEIVER_THREADS", "many")
    with pytest.raises(ConfigurationError) as caught:
        table.load_settings()
    threads, told = sorted(str(caught.value).splitlines(), reverse=True)
    assert threads.startswith("RECEIVER_THREADS: ")
    how = "use kill, raise, cut or delay:SECONDS, optionally followed by @CHANCE or #N"
    assert told.removeprefix(f"{VARIABLE}: ").split("; ") == [
        "nowhere is not a fail-point",
        f"door.judged=explode: {how}",
        f"door.queued: {how}",
        "door.body_read=raise@2: the chance must be above 0 and at most 1",
        "lane.told=cut@0: the chance must be above 0 and at most 1",
        "lane.left=kill#0: the first pass is #1",
        "lane.cut is given twice",
        f"lane.claimed=delay: {how}",
    ]


def test_a_file_is_no_place_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a .env file it would be forgotten."""
    (tmp_path / ".env").write_text(f"{VARIABLE}=door.judged=raise\n")
    monkeypatch.setenv("RECEIVER_DATA_DIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match=f"{VARIABLE} stands in {tmp_path}/.env: it is read from the environ"):
        table.load_settings()


def test_each_point_is_passed_in_one_place() -> None:
    """The table and the program agree: no point is passed that is not declared, and none twice or never."""
    bound = Counter(
        str(ast.literal_eval(node.args[0]))
        for path in _PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "point"
    )
    assert bound == Counter(POINTS.keys())
    with pytest.raises(LookupError):
        faults.point("nowhere")


def test_without_the_variable_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is bound at import does nothing, and stays so whatever is put into the environment later."""
    monkeypatch.setenv(VARIABLE, ",".join(f"{name}=raise" for name in POINTS))
    faults.point("ledger.committed")()
    assert faults.point("ledger.committed") is faults.point("door.judged")


def test_each_time_by_chance_or_once() -> None:
    """The third time alone; or so often as the chance says."""
    made = _armed("door.judged=raise#3,door.queued=raise@0.5,lane.left=raise")
    struck: Counter[str] = Counter()
    for number in range(1, 401):
        for name in ("door.judged", "door.queued", "lane.left", "lane.told"):
            try:
                made.passing(name)
            except FaultTriggered:
                struck[name] += 1
                assert name != "door.judged" or number == 3
    assert (struck["door.judged"], struck["lane.left"], struck["lane.told"]) == (1, 400, 0)
    assert 100 < struck["door.queued"] < 300


def test_the_connections_are_cut() -> None:
    """By whoever knows them."""
    cuts: list[None] = []
    _armed("lane.told=cut", cut=lambda: cuts.append(None)).passing("lane.told")
    assert cuts == [None]


def test_where_production_is_none_can_be_armed() -> None:
    """Both are named."""
    with pytest.raises(ConfigurationError, match=f"^{VARIABLE} is set, but lab is a production destination: "):
        _armed("door.judged=raise", production=lambda: "lab")


def test_where_production_appears_nothing_happens_any_more() -> None:
    """It is asked before each strike, and found for good."""
    answers: list[str | None] = [None, None, "lab", None]
    made = _armed("door.judged=raise", production=lambda: answers.pop(0))
    with pytest.raises(FaultTriggered):
        made.passing("door.judged")
    made.passing("door.judged")
    made.passing("door.judged")
    assert answers == [None]


def test_where_that_cannot_be_known_nothing_happens() -> None:
    """A process starts without its database, and its fail-points wait until it is there."""
    looks: list[Callable[[], str | None]] = [_unavailable, _unavailable, lambda: None]
    made = _armed("door.judged=raise", production=lambda: looks.pop(0)())
    made.passing("door.judged")
    with pytest.raises(FaultTriggered):
        made.passing("door.judged")


def test_kill_is_the_end() -> None:
    """Of the process in whose environment the variable stood; nothing runs after it, not even what ends a process."""
    program = (
        "from receiver.fault_injection import faults\npassed = faults.point('door.judged')\npassed()\n"
        "faults.enable(production=lambda: None, cut=lambda: None)\n"
        "try:\n    passed()\nfinally:\n    print('alive')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={VARIABLE: "door.judged=kill", "PYTHONPATH": str(_PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, "alive" in done.stdout) == (-signal.SIGKILL, False)
    assert "failpoint.triggered" in done.stdout + done.stderr
