"""Authentication to Redox for any httpx2 client: one bearer token shared by all threads, renewed before it expires.

Must not know what is sent. Must not put a token, an assertion or a key into a repr, a log or an exception.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Final

import httpx2

from receiver.outbound.errors import (
    AnswerLost,
    AuthenticationFailed,
    BadAnswer,
    OutboundError,
    RateLimited,
    RedoxUnavailable,
    Unsendable,
)
from receiver.outbound.limits import Limits, deadline, remaining
from receiver.outbound.wire import Wire, check_base_url
from receiver.protocol.api_keys import US, ApiKey, LegacyKey
from receiver.protocol.api_tokens import AccessToken, Denial, TokenRequest, read_token_reply, token_requests

# Seconds between renewals after a failure. A failed renewal does no harm while the current token is valid.
_AFTER_FAILED_RENEWAL: Final = 5.0
# Seconds. Redox allows 10 s of clock skew in an assertion. A larger difference explains a rejection.
_SKEW: Final = 10.0


def _identity(key: ApiKey) -> ApiKey:
    return key


def _utc_now() -> datetime:
    return datetime.now(UTC)


class RedoxAuth(httpx2.Auth):
    """Adds a Redox access token to the requests of an httpx2 client, sync or async (asyncio).

    `key` is a key, or a function that returns one. The function is called at each renewal, so a key that was replaced
    on disk is used without a restart. The token is sent only to the origin of `base_url`. Token requests use a separate
    connection with its own timeouts and limits, independent of the client's settings. Threads may share one instance.

    Without a token, the flow raises AuthenticationFailed, RateLimited, RedoxUnavailable or another error of
    receiver.outbound.errors, with `not_processed` set. For a request to another origin it raises Unsendable.
    """

    def __init__(
        self,
        key: ApiKey | Callable[[], ApiKey],
        *,
        base_url: str = US,
        limits: Limits | None = None,
        ssl_context: ssl.SSLContext | None = None,
        wire: Wire | None = None,
        now: Callable[[], datetime] = _utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._key: Callable[[], ApiKey] = key if callable(key) else partial(_identity, key)
        self.legacy: bool = isinstance(self._key(), LegacyKey)
        self._base_url = check_base_url(base_url)
        self._origin = _origin(httpx2.URL(self._base_url))
        self._limits = limits or Limits()
        self._owns_wire = wire is None
        self._wire = wire or Wire(limits=self._limits, ssl_context=ssl_context)
        self._now = now
        self._monotonic = monotonic
        self._lock = threading.Lock()  # for the three attributes below; never held during I/O
        self._held: AccessToken | None = None
        self._flight: Future[AccessToken] | None = None
        self._not_before = float("-inf")

    def __repr__(self) -> str:
        return f"RedoxAuth({self._base_url!r}, {'legacy' if self.legacy else 'OAuth'} key)"

    def close(self) -> None:
        """Close the connection for token requests, unless it was passed in."""
        if self._owns_wire:
            self._wire.close()

    def token(self, *, refused: AccessToken | None = None) -> AccessToken:
        """Return a valid token. `refused`: a token that Redox rejected; it is not returned again."""
        with self._lock:
            current = self._current(refused)
            if current is not None:
                return current
            flight, leading = self._flight, self._flight is None
            if flight is None:
                flight = self._flight = Future()
        with deadline(self._limits.token):
            if leading:
                self._lead(flight, refused)
            try:
                token = flight.result(remaining())
            except TimeoutError as exc:
                raise RedoxUnavailable("Redox issued no token in time", not_processed=True) from exc
        if (
            token is refused
        ):  # the renewal failed, and the thread that led it could still use the token that this one cannot
            raise RedoxUnavailable("Redox rejected the token, and issued no other", not_processed=True)
        return token

    def sync_auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response]:
        """Send one request. After a 401, send it once more with a new token, whatever the second response is."""
        self._check_origin(request)
        token = self.token()
        response = yield _with_token(request, token)
        if response.status_code == httpx2.codes.UNAUTHORIZED:
            yield _with_token(request, self.token(refused=token))

    async def async_auth_flow(self, request: httpx2.Request) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        """As sync_auth_flow. A renewal waits in a thread, so it does not block the event loop."""
        self._check_origin(request)
        with self._lock:
            current = self._current(None)
        token = await asyncio.to_thread(self.token) if current is None else current
        response = yield _with_token(request, token)
        if response.status_code == httpx2.codes.UNAUTHORIZED:
            yield _with_token(request, await asyncio.to_thread(self.token, refused=token))

    def _current(self, refused: AccessToken | None) -> AccessToken | None:
        """Return the current token if it is usable. None: fetch one or wait for it. Call only under the lock."""
        held, now = self._held, self._monotonic()
        if held is None or held is refused or held.expired(now):
            return None
        # Near the expiry one thread renews, and the other threads use the token that is still valid.
        if held.needs_renewal(now) and self._flight is None and now >= self._not_before:
            return None
        return held

    def _lead(self, flight: Future[AccessToken], refused: AccessToken | None) -> None:
        """Fetch a token for all threads that wait on `flight`. Raises only KeyboardInterrupt and SystemExit."""
        with self._lock:
            held = self._held
        outcome: AccessToken | Exception = RedoxUnavailable(
            "the renewal of the token was interrupted", not_processed=True
        )
        try:
            outcome = self._obtain(held)
        except Exception as exc:  # noqa: BLE001 — whatever it was, all who wait must learn of it
            outcome = exc
        finally:
            with self._lock:
                self._flight = None
                now = self._monotonic()
                if isinstance(outcome, AccessToken):
                    self._held = outcome
                elif held is not None and held is not refused and not held.expired(now):
                    self._not_before = now + _AFTER_FAILED_RENEWAL
                    outcome = held
            if isinstance(outcome, AccessToken):
                flight.set_result(outcome)
            else:
                flight.set_exception(outcome)

    def _obtain(self, held: AccessToken | None) -> AccessToken:
        key = self._key()
        requests = token_requests(key, self._base_url, held=held, now=self._now(), jti=str(uuid.uuid4()))
        for request in requests:
            sent = self._monotonic()
            response = self._ask(request)
            reply = read_token_reply(
                key, response.status_code, response.content, sent=sent, now=_date_of(response) or self._now()
            )
            if isinstance(reply, AccessToken):
                return reply
            failure = self._failure(reply, response)
            if not _is_refusal(reply.status):
                break
        raise failure

    def _ask(self, request: TokenRequest) -> httpx2.Response:
        outgoing = httpx2.Request(
            "POST",
            request.url,
            content=request.body,
            headers={"Content-Type": request.media_type, "Accept": "application/json", "Accept-Encoding": "identity"},
        )
        try:
            return self._wire.exchange(outgoing, most=self._limits.token_reply_bytes)
        except AnswerLost as exc:
            raise RedoxUnavailable("the token endpoint did not respond", not_processed=True) from exc
        except OutboundError as exc:
            exc.not_processed = (
                True  # whatever happened to the token request, the request that needs the token was not sent
            )
            raise

    def _failure(self, denial: Denial, response: httpx2.Response) -> OutboundError:
        status = denial.status
        if status == httpx2.codes.TOO_MANY_REQUESTS:
            return RateLimited(
                f"the token endpoint received too many requests (HTTP {status})", status=status, not_processed=True
            )
        if 200 <= status < 300:
            return BadAnswer(
                f"the response of the token endpoint contains no valid token (HTTP {status}): check the base URL",
                status=status,
                not_processed=True,
            )
        if not _is_refusal(status):
            return RedoxUnavailable(
                f"the token endpoint issued no token (HTTP {status})", status=status, not_processed=True
            )
        reason = ": ".join(word for word in (denial.error, denial.description) if word)
        fix = (
            "check the legacy API key and its secret"
            if self.legacy
            else "check the client id, the kid and the private key against the Redox dashboard"
        )
        date = _date_of(response)
        if date is not None and abs(off := (self._now() - date).total_seconds()) > _SKEW:
            fix = f"this host's clock differs from Redox's by {off:.0f} s: correct the clock, then {fix}"
        return AuthenticationFailed(
            f"Redox issued no token (HTTP {status}{', ' + reason if reason else ''}): {fix}",
            status=status,
            not_processed=True,
        )

    def _check_origin(self, request: httpx2.Request) -> None:
        if _origin(request.url) != self._origin:
            raise Unsendable("the request has another origin than the base URL: the Redox token is not sent there")


def _with_token(request: httpx2.Request, token: AccessToken) -> httpx2.Request:
    request.headers["Authorization"] = f"Bearer {token.value}"
    return request


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _is_refusal(status: int) -> bool:
    return 400 <= status < 500 and status not in (httpx2.codes.TOO_MANY_REQUESTS, httpx2.codes.REQUEST_TIMEOUT)


def _date_of(response: httpx2.Response) -> datetime | None:
    """Return Redox's time from the Date header of the response (RFC 9110 6.6.1)."""
    try:
        date = parsedate_to_datetime(response.headers.get("date", ""))
    except (ValueError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
