"""One keep-alive HTTP connection to the destination, and what came back over it.

May not retry or decide: an answer that did not come is an Answer too.
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

_ANSWER_LIMIT: Final = 40 * 1024 * 1024  # what Redox itself takes in one message


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpReply:
    """What a request came back with. `status` is None when no answer came; `error` then says why, in one word.

    `sent_at` is monotonic seconds, taken before connecting; `seconds` how long it took. Header names are lower case.
    """

    status: int | None
    body: bytes = field(default=b"", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    error: str | None = None
    sent_at: float
    seconds: float

    @property
    def accepted(self) -> bool:
        """Redox takes any status of 400 or more, and no answer, for a failure."""
        return self.status is not None and self.status < 400

    def json(self) -> Any:
        """The body, decoded. Raises ValueError when it is no JSON."""
        return json.loads(self.body)


class HttpConnection:
    """A connection that is opened when needed and kept while the other side keeps it. Not for two threads at once."""

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
        """Send one request and wait for its answer, at most the line's timeout for each read.

        With `lose_answer` the connection is cut once the answer has begun to arrive: the other side has done its work,
        and nobody here knows.
        """
        sent_at = monotonic()
        try:
            self._hang_up_if_dead()
            self._connection.request(method, target, body=body, headers=dict(headers))
            if lose_answer:
                select.select([self._connection.sock], [], [], self._timeout)
                self.close()
                return HttpReply(status=None, error="AnswerLost", sent_at=sent_at, seconds=monotonic() - sent_at)
            response: HTTPResponse = self._connection.getresponse()
            content = response.read(_ANSWER_LIMIT)
            if not response.isclosed():  # longer than the limit: what is left would be taken for the next answer
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

    def _hang_up_if_dead(self) -> None:
        """A server that has ended an idle connection has made it readable; what is sent into it would be lost."""
        sock = self._connection.sock
        if sock is not None and select.select([sock], [], [], 0)[0]:
            self.close()
