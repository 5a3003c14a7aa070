"""A receiver that really serves, as in tests/web."""

from tests.support.site import server, server_mode, site

__all__ = ["server", "server_mode", "site"]
