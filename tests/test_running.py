"""tests/running.sh repeats failed tests alone, and names those that pass then."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

_SCRIPT: Final = Path(__file__).with_name("running.sh")
_RUN: Final = """
set -euo pipefail
source "$1"
retry_failed_serially "$2" -m pytest -q -p no:randomly tests
echo "the run goes on"
"""
# Workers of pytest-xdist have this variable; a test that runs alone does not.
_FAILS_AMONG_OTHERS: Final = """
import os
def test_shared():
    assert "PYTEST_XDIST_WORKER" not in os.environ
"""
_PASSES: Final = "def test_fine():\n    pass\n"
_BROKEN: Final = "def test_broken():\n    assert not 'ever'\n"


@pytest.mark.parametrize(
    ("suite", "passes", "flaky", "reason"),
    [
        ({"web/test_a.py": _PASSES}, True, [], None),
        ({"web/test_a.py": _PASSES, "web/test_b.py": _BROKEN}, False, [], None),
        ({"web/test_a.py": _FAILS_AMONG_OTHERS}, True, ["tests/web/test_a.py::test_shared"], None),
        (
            {"web/test_a.py": _FAILS_AMONG_OTHERS, "web/test_b.py": _BROKEN},
            False,
            ["tests/web/test_a.py::test_shared"],
            None,
        ),
        (
            {"protocol/test_a.py": _FAILS_AMONG_OTHERS},
            False,
            ["tests/protocol/test_a.py::test_shared"],
            "tests/protocol/test_a.py::test_shared starts no process",
        ),
        (
            {"test_pipeline.py": _FAILS_AMONG_OTHERS},
            False,
            ["tests/test_pipeline.py::test_shared"],
            "tests/test_pipeline.py::test_shared starts no process",
        ),
    ],
    ids=["passes", "broken", "flaky", "flaky and broken", "pure directory", "pure file"],
)
def test_a_flaky_test_is_named(
    tmp_path: Path, suite: dict[str, str], passes: bool, flaky: list[str], reason: str | None
) -> None:
    """It is listed at the end of the run and in a file, and fails the run only if it starts no process."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name, content in suite.items():
        file = tmp_path / "tests" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    done = subprocess.run(
        ["bash", "-c", _RUN, "bash", _SCRIPT, sys.executable],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COVERAGE_"))},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    printed = done.stdout
    assert (done.returncode == 0) is passes, printed + done.stderr
    assert ("the run goes on" in printed) is passes
    _, marker, listed = printed.partition("== FLAKY: ")
    assert bool(marker) is bool(flaky)
    assert [line for line in listed.splitlines() if line.startswith("tests/")] == flaky
    file = tmp_path / ".flaky-tests"
    lines = file.read_text().splitlines() if file.exists() else []
    assert [line.split(maxsplit=1)[1] for line in lines] == flaky
    assert reason is None or reason in printed
    assert reason is not None or "starts no process" not in printed
