"""RedoxClient: messages, queries, FHIR and files to Redox, from any script; it needs no database and no settings.

May not keep what it sends: what must survive a crash belongs into the outbox.
"""

from __future__ import annotations

import io
import os
import random
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Literal, Self

import httpx2

from receiver import __version__
from receiver.errors import ConfigurationError
from receiver.outbound.answers import Answer, judge
from receiver.outbound.auth import RedoxAuth
from receiver.outbound.errors import AnswerLost, OutboundError, Unsendable
from receiver.outbound.fhir import Environment, FhirDestination
from receiver.outbound.limits import Limits, SlidingWindow, deadline, remaining
from receiver.outbound.messages import SOURCE_HEADER, NetworkOnramp, Outgoing, prepare
from receiver.outbound.wire import Wire, check_base_url
from receiver.protocol.credentials import US, ApiKey

# Redox documents no Retry-After; where something sends one, a direct call waits no longer than this for it.
_LONGEST_PAUSE: Final = 30.0

_HEADERS: Final = {"Accept": "application/json", "Accept-Encoding": "identity",
                   "User-Agent": f"redox-receiver/{__version__}"}


class RedoxClient:
    """Speaks to Redox with one API key. Threads may share one client; a process makes its own, after any fork.

    `key` is a key or a function that returns one (see RedoxAuth). `base_url` is `US`, `CANADA` or any other. `source` is
    the id that goes into messages which name none; with `several_keys` (Redox: several OAuth keys and sources in one
    environment) a message that ends up without one is refused before it is sent. `query_path` is `/query` where an
    older set-up wants that. `rate` may be shared with other clients behind the same address.

    All calls raise the errors of receiver.outbound.errors. What was certainly not processed (no connection, 429, 503)
    is tried again within `limits`; nothing else is, since Redox may have acted on it.
    """

    def __init__(self, key: ApiKey | Callable[[], ApiKey], *, base_url: str = US, source: str | None = None,
                 several_keys: bool = False, query_path: str = "/endpoint", upload_path: str = "/uploads",
                 limits: Limits | None = None, rate: SlidingWindow | None = None,
                 ssl_context: ssl.SSLContext | None = None) -> None:
        self._limits = limits or Limits()
        self._base_url = check_base_url(base_url)
        self._send_url = httpx2.URL(f"{self._base_url}/endpoint")
        self._query_url = httpx2.URL(f"{self._base_url}{_check_path(query_path)}")
        self._upload_url = httpx2.URL(f"{self._base_url}{_check_path(upload_path)}")
        self._source = _check_source(source)
        self._several_keys = several_keys
        self._wire = Wire(limits=self._limits, rate=rate, ssl_context=ssl_context)
        self._auth = RedoxAuth(key, base_url=self._base_url, limits=self._limits, wire=self._wire)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._wire.close()

    @property
    def auth(self) -> RedoxAuth:
        """The authentication, for use with another httpx2 client."""
        return self._auth

    def send(self, message: Outgoing, *, onramp: NetworkOnramp | None = None) -> Answer:
        """Send a Data Model message; the answer says that Redox accepted it, not that it was delivered."""
        return self._message(self._send_url, message, query=False, onramp=onramp)

    def query(self, message: Outgoing, *, onramp: NetworkOnramp | None = None) -> Answer:
        """Ask one destination; `answer.data` is the response message, a dict."""
        answer = self._message(self._query_url, message, query=True, onramp=onramp)
        if not isinstance(answer.data, dict):
            raise AnswerLost("the query was answered with no message in it", status=answer.status)
        return answer

    def fhir(self, destination: str, environment: Environment) -> FhirDestination:
        """The FHIR R4 resources of a destination, by its slug. Raises Unsendable with a legacy key."""
        if self._auth.legacy:
            raise Unsendable("a legacy API key serves the Data Model API only; FHIR takes an OAuth API key")
        return FhirDestination(call=self.call, base_url=self._base_url, slug=destination, environment=environment)

    def upload(self, file: bytes | str | os.PathLike[str] | BinaryIO, *, filename: str | None = None,
               media_type: str | None = None) -> str:
        """Upload a file (a path, bytes, or an open binary file, from its beginning) and return its URI.

        It is streamed, and refused before anything is sent when it is larger than `limits.upload_bytes`.
        """
        if isinstance(file, str | os.PathLike):
            with Path(file).open("rb") as opened:
                return self.upload(opened, filename=filename, media_type=media_type)
        size = len(file) if isinstance(file, bytes) else _size_of(file)
        if size > self._limits.upload_bytes:
            raise Unsendable(f"the file has {size} bytes, and Redox takes uploads of {self._limits.upload_bytes} at most")
        name = filename or os.path.basename(str(getattr(file, "name", "upload")))
        part = (name, file, media_type) if media_type else (name, file)
        answer = self.call("POST", self._upload_url, files={"file": part})
        uri = answer.data.get("URI") if isinstance(answer.data, dict) else None
        if not isinstance(uri, str) or not uri:
            raise AnswerLost("the upload was answered without a URI", status=answer.status)
        return uri

    def call(self, method: Literal["GET", "POST"], url: httpx2.URL, *, headers: Mapping[str, str] | None = None,
             body: bytes | None = None, files: Mapping[str, object] | None = None) -> Answer:
        """One authenticated request under all the manners; what the other methods are made of.

        A Data Model body names its source itself; everything else does by header.
        """
        if body is not None and len(body) > self._limits.request_bytes:
            raise Unsendable(f"the message has {len(body)} bytes, and Redox takes {self._limits.request_bytes} at most")
        named = {} if self._source is None or headers is ... else {SOURCE_HEADER: self._source}
        request = httpx2.Request(method, url, headers={**_HEADERS, **named, **(headers or {})}, content=body, files=files)
        with deadline(self._limits.total):
            for attempt in range(1, self._limits.attempts + 1):
                try:
                    return judge(self._exchange(request))
                except OutboundError as exc:
                    pause = self._pause(attempt, exc)
                    if attempt == self._limits.attempts or not (exc.retryable and exc.not_processed) or pause > remaining():
                        raise
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")
