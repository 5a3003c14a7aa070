"""What a server's processes do without. Imported before all else: it imports structlog without rich.

structlog shows errors on a terminal by rich wherever that is installed, and so imports all of it: megabytes in every
process of a server that writes JSON. May not keep rich from who asks for it later.
"""

import gc
import sys
from typing import Any, Final

# Objects made until the collector looks for cycles among them. A request leaves next to none: to look after every 700,
# as Python does, is to look in vain, several times a request.
_LOOK: Final = 10_000

_modules: dict[str, Any] = sys.modules
if "rich" not in _modules:
    _modules["rich"] = None  # an import of it fails
    try:
        import structlog  # noqa: F401 - for what it leaves out
    finally:
        del _modules["rich"]


def settle() -> None:
    """Tell the collector that what there is now stays: called when a process has all that it serves with."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_LOOK, 20, 20)
