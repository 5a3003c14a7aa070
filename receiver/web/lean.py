"""Imports structlog without rich, before anybody else imports it.

structlog shows errors on a terminal by rich wherever that is installed, and so imports all of it: megabytes in every
process of a server that writes JSON. May not keep rich from who asks for it later.
"""

import sys
from typing import Any

_modules: dict[str, Any] = sys.modules
if "rich" not in _modules:
    _modules["rich"] = None  # an import of it fails
    try:
        import structlog  # noqa: F401 - for what it leaves out
    finally:
        del _modules["rich"]
