"""Fail-points: the syntax of the variable, where each fail-point is, and that they do nothing without the variable."""

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


def _enabled(
    text: str, *, production: Callable[[], str | None] = lambda: None, cut: Callable[[], object] = lambda: None
) -> FaultRegistry:
    made = FaultRegistry()
    made.enable(text, production=production, cut=cut)
    return made


def test_syntax() -> None:
    """An action for each fail-point, with a chance, a pass number or neither. Whitespace is ignored."""
    assert parse(" ledger.committed=kill@0.02, lane.claimed=delay:0.5#3,request.judged = raise,,") == {
        "ledger.committed": FaultAction(action="kill", chance=0.02),
        "lane.claimed": FaultAction(action="delay", seconds=0.5, hit=3),
        "request.judged": FaultAction(action="raise"),
    }
    assert parse("") == {}


def test_all_mistakes_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """All mistakes are reported at once, together with mistakes in other settings."""
    mistakes = (
        "nowhere=kill",
        "request.judged=explode",
        "request.queued",
        "request.body_read=raise@2",
        "lane.commanded=cut@0",
        "lane.run_ended=kill#0",
        "lane.killed=kill",
        "lane.killed=raise",
        "lane.claimed=delay",
    )
    monkeypatch.setenv(VARIABLE, ",".join(mistakes))
    monkeypatch.setenv("RECEIVER_THREADS", "many")
    with pytest.raises(ConfigurationError) as caught:
        table.load_settings()
    threads, failpoints = sorted(str(caught.value).splitlines(), reverse=True)
    assert threads.startswith("RECEIVER_THREADS: ")
    how = "use kill, raise, cut or delay:SECONDS, optionally followed by @CHANCE or #N"
    assert failpoints.removeprefix(f"{VARIABLE}: ").split("; ") == [
        "nowhere is not a fail-point",
        f"request.judged=explode: {how}",
        f"request.queued: {how}",
        "request.body_read=raise@2: the chance must be above 0 and at most 1",
        "lane.commanded=cut@0: the chance must be above 0 and at most 1",
        "lane.run_ended=kill#0: the first pass is #1",
        "lane.killed is given twice",
        f"lane.claimed=delay: {how}",
    ]


def test_not_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The variable is refused in a .env file, where it could be forgotten."""
    (tmp_path / ".env").write_text(f"{VARIABLE}=request.judged=raise\n")
    monkeypatch.setenv("RECEIVER_DATA_DIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match=f"{VARIABLE} stands in {tmp_path}/.env: it is read from the environ"):
        table.load_settings()


def test_each_point_is_passed_in_one_place() -> None:
    """Each declared fail-point is in one place of the program, and no other fail-point is."""
    bound = Counter(
        str(ast.literal_eval(node.args[0]))
        for path in _PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "point"
    )
    assert bound == Counter(POINTS.keys())
    with pytest.raises(LookupError):
        faults.point("nowhere")


def test_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fail-point that is bound without the variable does nothing, even if the variable is set later."""
    monkeypatch.setenv(VARIABLE, ",".join(f"{name}=raise" for name in POINTS))
    faults.point("ledger.committed")()
    assert faults.point("ledger.committed") is faults.point("request.judged")


def test_each_time_by_chance_or_once() -> None:
    """An action runs only on the third pass, or as often as its chance says."""
    made = _enabled("request.judged=raise#3,request.queued=raise@0.5,lane.run_ended=raise")
    triggered: Counter[str] = Counter()
    for number in range(1, 401):
        for name in ("request.judged", "request.queued", "lane.run_ended", "lane.commanded"):
            try:
                made.passing(name)
            except FaultTriggered:
                triggered[name] += 1
                assert name != "request.judged" or number == 3
    assert (triggered["request.judged"], triggered["lane.run_ended"], triggered["lane.commanded"]) == (1, 400, 0)
    assert 100 < triggered["request.queued"] < 300


def test_cut() -> None:
    """`cut` calls the function that cuts the connections."""
    cuts: list[None] = []
    _enabled("lane.commanded=cut", cut=lambda: cuts.append(None)).passing("lane.commanded")
    assert cuts == [None]


def test_production_destinations() -> None:
    """A process with the variable does not start with a production destination. The error names both."""
    with pytest.raises(ConfigurationError, match=f"^{VARIABLE} is set, but lab is a production destination: "):
        _enabled("request.judged=raise", production=lambda: "lab")


def test_a_new_production_destination() -> None:
    """The check repeats before each action. A production destination disables all actions for good."""
    answers: list[str | None] = [None, None, "lab", None]
    made = _enabled("request.judged=raise", production=lambda: answers.pop(0))
    with pytest.raises(FaultTriggered):
        made.passing("request.judged")
    made.passing("request.judged")
    made.passing("request.judged")
    assert answers == [None]


def test_without_the_database() -> None:
    """A process starts without its database, and no action runs until the check succeeds."""
    looks: list[Callable[[], str | None]] = [_unavailable, _unavailable, lambda: None]
    made = _enabled("request.judged=raise", production=lambda: looks.pop(0)())
    made.passing("request.judged")
    with pytest.raises(FaultTriggered):
        made.passing("request.judged")


def test_kill() -> None:
    """`kill` ends the process with SIGKILL; nothing runs after it."""
    program = (
        "from receiver.fault_injection import faults\npassed = faults.point('request.judged')\npassed()\n"
        "faults.enable(production=lambda: None, cut=lambda: None)\n"
        "try:\n    passed()\nfinally:\n    print('alive')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={VARIABLE: "request.judged=kill", "PYTHONPATH": str(_PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, "alive" in done.stdout) == (-signal.SIGKILL, False)
    assert "failpoint.triggered" in done.stdout + done.stderr
