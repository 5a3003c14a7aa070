"""A receiver that really serves, once a module."""

from tests.support.site import server, server_mode, site

__all__ = ["server", "server_mode", "site"]
