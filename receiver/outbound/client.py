"""RedoxClient: sends messages, queries, FHIR requests and files to Redox. It needs no database and no settings.

Must not store what it sends: use the outbox for messages that must survive a crash.
"""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import httpx2

from receiver import __version__
from receiver.outbound.answers import Answer, interpret
from receiver.outbound.api import ApiProfile, FilePart, RedoxApi
from receiver.outbound.auth import RedoxAuth
from receiver.outbound.calls import Call
from receiver.outbound.errors import OutboundError, Unsendable
from receiver.outbound.limits import Limits, SlidingWindow, deadline, remaining
from receiver.outbound.wire import Wire, check_base_url
from receiver.protocol.api_keys import US, ApiKey

_HEADERS: Final = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "User-Agent": f"redox-receiver/{__version__}",
}


class RedoxClient(RedoxApi):
    """A Redox client with one API key. Threads may share it. Each process must create its own client, after any fork.

    `key` is a key or a function that returns one (see RedoxAuth). `base_url` is `US`, `CANADA` or another URL. `source`
    is the id that is added to messages without a source. With `several_keys` (Redox: several OAuth keys and sources in
    one environment), a message without a source is refused before it is sent. `query_path`: use `/query` where an older
    setup requires it. `rate` may be shared with other clients at the same address.

    All calls raise the errors of receiver.outbound.errors. If Redox certainly did not process the request (no
    connection, 429, 503), the client tries again within `limits`. Otherwise it does not, because Redox may have
    processed the request.
    """

    def __init__(
        self,
        key: ApiKey | Callable[[], ApiKey],
        *,
        base_url: str = US,
        source: str | None = None,
        several_keys: bool = False,
        query_path: str = "/endpoint",
        upload_path: str = "/uploads",
        limits: Limits | None = None,
        rate: SlidingWindow | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        limits = limits or Limits()
        self._base_url = check_base_url(base_url)
        self._wire = Wire(limits=limits, rate=rate, ssl_context=ssl_context)
        self._auth = RedoxAuth(key, base_url=self._base_url, limits=limits, wire=self._wire)
        super().__init__(
            ApiProfile(
                legacy=self._auth.legacy,
                source=source,
                several_keys=several_keys,
                query_path=query_path,
                upload_path=upload_path,
            ),
            limits,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._wire.close()

    @property
    def auth(self) -> RedoxAuth:
        """The authentication, for use with another httpx2 client."""
        return self._auth

    def carry_out(self, call: Call, file: FilePart | None = None) -> Answer:
        """Send a prepared call. `file`: the content of an upload."""
        if call.body is not None and len(call.body) > self.limits.request_bytes:
            raise Unsendable(
                f"the message has {len(call.body)} bytes: Redox accepts at most {self.limits.request_bytes}"
            )
        try:
            request = httpx2.Request(
                call.method,
                f"{self._base_url}{call.path}",
                headers={**_HEADERS, **call.headers},
                content=call.body,
                files=None if file is None else {"file": file},
            )
        except ValueError as exc:
            raise Unsendable(
                "the name or media type of the file cannot be written into a request: use plain ASCII"
            ) from exc
        attempt = 1
        with deadline(self.limits.total):
            while True:
                try:
                    return interpret(self._exchange(request))
                except OutboundError as exc:
                    pause = self._pause(attempt, exc)
                    repeatable = exc.retryable and exc.not_processed
                    if not repeatable or attempt >= self.limits.attempts or pause >= remaining():
                        raise
                time.sleep(pause)
                attempt += 1

    def _exchange(self, request: httpx2.Request) -> httpx2.Response:
        """Send the request with authentication: once, and once more after a 401."""
        flow = self._auth.sync_auth_flow(request)
        try:
            outgoing = next(flow)
            while True:
                response = self._wire.exchange(outgoing, most=self.limits.response_bytes)
                try:
                    outgoing = flow.send(response)
                except StopIteration:
                    return response
        finally:
            flow.close()

    def _pause(self, attempt: int, exc: OutboundError) -> float:
        backoff = self.limits.pause * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.0)  # noqa: S311 — jitter, no secret
        return max(backoff, exc.retry_after or 0.0)
