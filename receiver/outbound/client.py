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

FilePart = tuple[str, bytes | BinaryIO, str | None]

_HEADERS: Final = {"Accept": "application/json", "Accept-Encoding": "identity",
                   "User-Agent": f"redox-receiver/{__version__}"}


class RedoxClient:
    """Speaks to Redox with one API key. Threads may share one client; a process makes its own, after any fork.

    `key` is a key or a function that returns one (see RedoxAuth). `base_url` is `US`, `CANADA` or any other. `source`
    is the id that goes into messages which name none; with `several_keys` (Redox: several OAuth keys and sources in
    one environment) a message that ends up without one is refused before it is sent. `query_path` is `/query` where
    an older set-up wants that. `rate` may be shared with other clients behind the same address.

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
        return FhirDestination(base_url=self._base_url, slug=destination, environment=environment,
                               call=self._fhir_call)

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
            raise Unsendable(f"the file has {size} bytes; Redox takes uploads of {self._limits.upload_bytes} at most")
        name = filename or Path(str(getattr(file, "name", "upload"))).name
        part: FilePart = (name, file, media_type)  # without a media type, httpx2 goes by the name
        answer = self._carry_out("POST", self._upload_url, self._source_header(), files={"file": part})
        uri = answer.data.get("URI") if isinstance(answer.data, dict) else None
        if not isinstance(uri, str) or not uri:
            raise AnswerLost("the upload was answered without a URI", status=answer.status)
        return uri

    def _message(self, url: httpx2.URL, message: Outgoing, *, query: bool, onramp: NetworkOnramp | None) -> Answer:
        if onramp is not None and self._auth.legacy:
            raise Unsendable("network onramps take no legacy API key (Redox: their tokens must live less than a day)")
        prepared = prepare(message, query=query, source=self._source, source_required=self._several_keys, onramp=onramp)
        return self._carry_out("POST", url, {"Content-Type": "application/json", **prepared.headers},
                               body=prepared.body)

    def _fhir_call(self, method: Literal["GET", "POST"], url: httpx2.URL, headers: Mapping[str, str],
                   body: bytes | None) -> Answer:
        return self._carry_out(method, url, {**self._source_header(), **headers}, body=body)

    def _source_header(self) -> Mapping[str, str]:
        if self._source is not None:
            return {SOURCE_HEADER: self._source}
        if self._several_keys:
            raise Unsendable("several API keys exist here, and no source is named; give the client its source")
        return {}

    def _carry_out(self, method: Literal["GET", "POST"], url: httpx2.URL, headers: Mapping[str, str], *,
                   body: bytes | None = None, files: Mapping[str, FilePart] | None = None) -> Answer:
        if body is not None and len(body) > self._limits.request_bytes:
            raise Unsendable(f"the message has {len(body)} bytes, and Redox takes {self._limits.request_bytes} at most")
        try:
            request = httpx2.Request(method, url, headers={**_HEADERS, **headers}, content=body, files=files)
        except ValueError as exc:
            raise Unsendable("the file's name or media type can't be written into a request") from exc
        attempt = 1
        with deadline(self._limits.total):
            while True:
                try:
                    return judge(self._exchange(request))
                except OutboundError as exc:
                    pause = self._pause(attempt, exc)
                    sure = exc.retryable and exc.not_processed
                    if not sure or attempt >= self._limits.attempts or pause >= remaining():
                        raise
                time.sleep(pause)
                attempt += 1

    def _exchange(self, request: httpx2.Request) -> httpx2.Response:
        """The request as the authentication would have it: once, and once more after a 401."""
        flow = self._auth.sync_auth_flow(request)
        try:
            outgoing = next(flow)
            while True:
                response = self._wire.exchange(outgoing, most=self._limits.response_bytes)
                try:
                    outgoing = flow.send(response)
                except StopIteration:
                    return response
        finally:
            flow.close()

    def _pause(self, attempt: int, exc: OutboundError) -> float:
        backoff = self._limits.pause * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.0)  # noqa: S311 — jitter, no secret
        return max(backoff, exc.retry_after or 0.0)


def _check_path(path: str) -> str:
    if not path.startswith("/") or any(c in path for c in "?# \\"):
        raise ConfigurationError("a path on the Redox API begins with a slash and has no query: /endpoint, /query")
    return path


def _check_source(source: str | None) -> str | None:
    if source is not None and (not source.isascii() or not source.isprintable() or not source.strip()):
        raise ConfigurationError("the source id is the UUID that the Redox dashboard shows for the source")
    return source


def _size_of(file: object) -> int:
    if isinstance(file, io.TextIOBase):
        raise Unsendable("the file is open as text; open it in binary mode, or pass its path")
    try:
        return int(file.seek(0, io.SEEK_END))  # type: ignore[attr-defined]  # what has no seek is refused just below
    except (AttributeError, OSError, ValueError) as exc:
        raise Unsendable("the size of that stream can't be known beforehand; read it into bytes, or pass a "
                         "path") from exc
