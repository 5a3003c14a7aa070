"""The head of a request: its limits, and the HTTP that is refused before an application sees it.

A head has limits in bytes and fields. It may have one Host field, no transfer coding but chunked, and no expectation
but 100-continue. Must not know a connection.
"""

from __future__ import annotations

from typing import Final

MAX_REQUEST_LINE: Final = 4096
MAX_FIELDS: Final = 100
MAX_FIELD: Final = 8190
MAX_HEAD: Final = 64 * 1024
# In addition to the target, in a request line: the longest method that is served, the version, two spaces.
_LINE: Final = len("OPTIONS  HTTP/1.1")


class HttpRefusal(Exception):
    """The server refuses the request with this status; the application does not see it."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class RequestHead:
    """The head of the request that a connection receives.

    `incomplete`: the head has begun and not ended. `upgrade`: it offers another protocol, so no further request is
    read. `status`: the status of the reply when parsing fails.
    """

    def __init__(self) -> None:
        self.incomplete = self.upgrade = False
        self.status = 400
        self._line = self._size = self._fields = self._hosts = 0

    def begin(self) -> None:
        """A request begins."""
        self.incomplete = True
        self._line = _LINE
        self._size = self._fields = self._hosts = 0

    def url(self, url: bytes) -> None:
        """Count a piece of the target. Raises HttpRefusal."""
        self._line += len(url)
        if self._line > MAX_REQUEST_LINE:
            raise self.refuse(414)

    def field(self, name: bytes, value: bytes) -> bool:
        """Check a header field. Return False for a trailer, which is dropped. Raises HttpRefusal."""
        size = len(name) + len(value) + 4
        self._fields += 1
        self._size += size
        if self._fields > MAX_FIELDS or self._size > MAX_HEAD or size > MAX_FIELD:
            raise self.refuse(431 if self.incomplete else 400)
        if not self.incomplete:
            return False
        match name.lower():
            case b"host":
                self._hosts += 1
                if self._hosts > 1:
                    raise self.refuse(400)
            case b"expect":
                if value.lower() != b"100-continue":
                    raise self.refuse(417)
            case b"transfer-encoding":
                if value.lower() != b"chunked":
                    raise self.refuse(501)
            case b"upgrade":
                self.upgrade = True  # what follows is in a protocol that is not supported
        return True

    def version(self, version: str) -> None:
        """Check the version of HTTP: the parser also accepts 0.9 and 2.0. Raises HttpRefusal."""
        if version not in ("1.0", "1.1"):
            raise self.refuse(400)

    def refuse(self, status: int) -> HttpRefusal:
        """Return the exception that ends parsing; `status` is the status of the reply."""
        self.status = status
        return HttpRefusal(status)
