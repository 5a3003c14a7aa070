"""Choose which processes that tests start are measured by coverage.

Measuring makes a process start half as long again, and most of a test's time is processes starting. So only those are
measured whose code runs nowhere else: servers and workers of their own (tests/web, tests/worker).
"""

from __future__ import annotations

import os
from typing import Final

_CONFIGURATION: Final = "COVERAGE_PROCESS_CONFIG"

# The environment variables of a process that is to be measured.
MEASURED: Final[dict[str, str]] = {}


def keep_to_ourselves() -> None:
    """Measure no process from now on, except those with MEASURED in their environment."""
    configuration = os.environ.pop(_CONFIGURATION, None)
    if configuration is not None:
        MEASURED[_CONFIGURATION] = configuration
