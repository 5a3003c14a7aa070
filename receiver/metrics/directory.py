"""The directory in which the processes of a host share their counters: one memory-mapped file for each process.

prometheus-client decides when it is imported whether counters are shared, by its variable PROMETHEUS_MULTIPROC_DIR.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import structlog

log: Final = structlog.get_logger(__name__)

# prometheus-client's own variable: an operator may set it, for example to a directory in memory.
VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
_FILE: Final = re.compile(r"[a-z_]+_(\d+)\.db")


def share_counters(data_dir: Path) -> Path | None:
    """Have this process share its counters, in `metrics` below the data directory unless the variable names another.

    Files that earlier processes left are removed once none of their processes runs: as long as one does, the sums must
    not go down. Returns None, after a warning, when the directory cannot be written: the process then counts for itself
    alone.
    """
    path = Path(os.environ.get(VARIABLE) or data_dir / "metrics")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = [(file, int(found[1])) for file in path.iterdir() if (found := _FILE.fullmatch(file.name))]
        if not any(_runs(process) for _, process in files):
            for file, _ in files:
                file.unlink(missing_ok=True)
        # The library would fail at the first count instead.
        probe = path / f".probe-{os.getpid()}"
        probe.touch(0o600)
        probe.unlink()
    except OSError as exc:
        os.environ.pop(VARIABLE, None)
        log.warning("metrics.not_shared", error=exc.strerror)
        return None
    os.environ[VARIABLE] = str(path)
    return path


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # of another account
    return True
