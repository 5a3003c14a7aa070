"""The directory of shared counters: chosen, cleaned when nobody counts, and left out when it cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from receiver.metrics.directory import VARIABLE, share_counters
from tests.support.processes import end


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the variable afterwards: share_counters sets it for this process."""
    monkeypatch.setenv(VARIABLE, "")


def test_below_the_data_directory(tmp_path: Path) -> None:
    """For this account alone, and in the variable that prometheus-client reads."""
    path = share_counters(tmp_path / "data")
    assert path == tmp_path / "data" / "metrics"
    assert path.stat().st_mode & 0o777 == 0o700
    assert os.environ[VARIABLE] == str(path)
    assert list(path.iterdir()) == []


def test_the_operator_may_name_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example one in memory."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "memory"))
    assert share_counters(tmp_path / "data") == tmp_path / "memory"
    assert not (tmp_path / "data").exists()


def test_files_stay_while_one_of_their_processes_runs(tmp_path: Path) -> None:
    """A sum that goes down would look like a restart; once all of them have ended, the next start begins at zero."""
    path = share_counters(tmp_path)
    assert path is not None
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    try:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait(60)
        files = [path / f"counter_{each}.db" for each in (process.pid, ended.pid)]
        for each in files:
            each.touch()
        (path / "README").touch()
        share_counters(tmp_path)
        assert all(each.exists() for each in files)
    finally:
        end(process, 30)
    share_counters(tmp_path)
    assert [each.name for each in path.iterdir()] == ["README"]


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """The process counts for itself alone, instead of failing at its first request."""
    (tmp_path / "metrics").write_text("a file")
    assert share_counters(tmp_path) is None
    assert VARIABLE not in os.environ
