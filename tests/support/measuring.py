"""Which of the processes that tests start are measured by coverage.

To be measured takes a process half as long again, and most of a test's time is processes starting. So those are whose
code runs nowhere else: servers and workers by themselves (tests/web, tests/handlers).
"""

from __future__ import annotations

import os
from typing import Final

_CONFIGURATION: Final = "COVERAGE_PROCESS_CONFIG"

# What a process to be measured finds in its environment.
MEASURED: Final[dict[str, str]] = {}


def keep_to_ourselves() -> None:
    """From now on no process is measured that does not find MEASURED in its environment."""
    configuration = os.environ.pop(_CONFIGURATION, None)
    if configuration is not None:
        MEASURED[_CONFIGURATION] = configuration
