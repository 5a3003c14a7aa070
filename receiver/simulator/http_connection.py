"""One keep-alive HTTP connection to the destination, and its responses.

Must not retry or decide: a missing response is an HttpReply, too.
"""

from __future__ import annotations

import json
import select
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from time import monotonic
from typing import Any, Final, Self
from urllib.parse import urlsplit

from receiver.errors import ConfigurationError

_ANSWER_LIMIT: Final = 40 * 1024 * 1024  # the largest message that Redox itself accepts


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpReply:
    """The response to a request. Without a response, `status` is None, and `error` is the reason in one word.

    `sent_at`: monotonic seconds before connecting. `seconds`: the duration. Header names are lower case.
    """

    status: int | None
    body: bytes = field(default=b"", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    error: str | None = None
    sent_at: float
    seconds: float

    @property
    def accepted(self) -> bool:
        """Redox counts any status of 400 or more, and a missing response, as a failure."""
        return self.status is not None and self.status < 400

    def json(self) -> Any:
        """Return the decoded body. Raises ValueError if it is not valid JSON."""
        return json.loads(self.body)


class HttpConnection:
    """A connection that opens when needed, and stays open while the server keeps it. For one thread at a time."""

    def __init__(self, base_url: str, *, timeout: float, tls: ssl.SSLContext | None = None) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigurationError("the base URL must be http://HOST:PORT or https://HOST[:PORT]")
        self._connection: HTTPConnection
        if url.scheme == "https":
            self._connection = HTTPSConnection(
                url.hostname, url.port, timeout=timeout, context=tls or ssl.create_default_context()
            )
        else:
            self._connection = HTTPConnection(url.hostname, url.port, timeout=timeout)
        self._timeout = timeout

    def request(
        self,
        method: str,
        target: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str],
        lose_answer: bool = False,
    ) -> HttpReply:
        """Send one request and wait for its response, with the connection's timeout for each read.

        `lose_answer`: close the connection when the response begins to arrive. The server has then processed the
        request, but the client has no response.
        """
        sent_at = monotonic()
        try:
            self._close_if_dead()
            self._connection.request(method, target, body=body, headers=dict(headers))
            if lose_answer:
                select.select([self._connection.sock], [], [], self._timeout)
                self.close()
                return HttpReply(status=None, error="AnswerLost", sent_at=sent_at, seconds=monotonic() - sent_at)
            response: HTTPResponse = self._connection.getresponse()
            content = response.read(_ANSWER_LIMIT)
            if not response.isclosed():  # longer than the limit: the rest would be read as the next response
                self.close()
        except (OSError, HTTPException) as exc:
            self.close()
            return HttpReply(status=None, error=type(exc).__name__, sent_at=sent_at, seconds=monotonic() - sent_at)
        return HttpReply(
            status=response.status,
            body=content,
            sent_at=sent_at,
            seconds=monotonic() - sent_at,
            headers={name.lower(): value for name, value in response.getheaders()},
        )

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_if_dead(self) -> None:
        """Close an idle connection that the server has closed: it is readable, and a request on it would be lost."""
        sock = self._connection.sock
        if sock is not None and select.select([sock], [], [], 0)[0]:
            self.close()
