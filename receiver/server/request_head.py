"""The head of a request as it arrives: its bounds, and what of HTTP is refused before an application sees it.

A head has bounds in bytes and fields; it has one Host field, no transfer coding but chunked, and expects nothing but
"100-continue". Must not know a connection.
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
    """The request is not answered by the application, but with this status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class RequestHead:
    """The head of the request that a connection is receiving.

    `incomplete`: more of it is to come. `upgrade`: it offers another protocol, so no request follows. `status`: what a
    failure of the parser is answered with.
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
        """A piece of its target. Raises HttpRefusal."""
        self._line += len(url)
        if self._line > MAX_REQUEST_LINE:
            raise self.refuse(414)

    def field(self, name: bytes, value: bytes) -> bool:
        """A whole header field; False: it is a trailer, which is dropped. Raises HttpRefusal."""
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
                self.upgrade = True  # what follows is in another protocol, which is not spoken here
        return True

    def version(self, version: str) -> None:
        """The version of HTTP: the parser takes 0.9 and 2.0 too. Raises HttpRefusal."""
        if version not in ("1.0", "1.1"):
            raise self.refuse(400)

    def refuse(self, status: int) -> HttpRefusal:
        """The exception that ends the parsing; `status` is the answer."""
        self.status = status
        return HttpRefusal(status)
