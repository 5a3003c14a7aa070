"""A receiver that really serves, as in tests/web."""

from tests.web.conftest import server, server_mode, site

__all__ = ["server", "server_mode", "site"]
