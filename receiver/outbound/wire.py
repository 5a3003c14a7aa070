"""One HTTP exchange: https, no redirects, no decompression, with limits for size, time and rate.

Uses httpcore2, the transport of httpx2, for two reasons. Its streams allow a deadline for the whole exchange (httpx2
limits single reads only). And the client of httpx2 logs every URL, which in FHIR can name patients. Must not know
Redox, retry, or read the environment (proxies, .netrc, certificate paths).
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Iterable, Iterator
from typing import Any, Final

import httpcore2
import httpx2

from receiver.errors import ConfigurationError
from receiver.outbound.errors import AnswerLost, OutboundError, RedoxUnavailable, Unsendable, Untrusted, UnusableAnswer
from receiver.outbound.limits import Limits, SlidingWindow, remaining

# Seconds until an idle connection is closed, shorter than the usual limit of load balancers (60 s). A request that is
# written while the other side closes the connection would have an unknown result.
_KEEP_IDLE: Final = 15.0


def check_base_url(text: str) -> str:
    """Return the base URL without a slash at its end.

    Raises ConfigurationError unless it is https, or http on a loopback address.
    """
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as exc:
        raise ConfigurationError("the base URL for Redox is not a valid URL") from exc
    if url.scheme != "https" and not (url.scheme == "http" and _is_loopback(url.host)):
        raise ConfigurationError(
            "the base URL for Redox must begin with https:// (http:// is allowed for loopback only)"
        )
    if not url.host or url.userinfo or url.query or url.fragment:
        raise ConfigurationError(
            "the base URL for Redox is not valid: use only a scheme, a host, and optionally a port and a path"
        )
    return str(url).rstrip("/")


class Wire:
    """Connections to one service. Threads may share it; processes must not (create it after a fork)."""

    def __init__(
        self, *, limits: Limits, rate: SlidingWindow | None = None, ssl_context: ssl.SSLContext | None = None
    ) -> None:
        self._limits = limits
        self._rate = rate or SlidingWindow()
        self._pool = httpcore2.ConnectionPool(
            ssl_context=ssl_context or httpx2.create_ssl_context(trust_env=False),
            max_connections=limits.connections,
            max_keepalive_connections=limits.connections,
            keepalive_expiry=_KEEP_IDLE,
            network_backend=_Backend(),
        )

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    def exchange(self, request: httpx2.Request, *, most: int) -> httpx2.Response:
        """Send the request and read the whole response, at most `most` bytes. Call only inside `limits.deadline`.

        Returns responses of any status except a redirect. Raises the errors of receiver.outbound.errors, with
        `not_processed` set if no connection was made.
        """
        self._rate.wait(remaining())
        if remaining() <= 0:
            raise RedoxUnavailable("the deadline passed before the request was sent", not_processed=True)
        timeouts = {
            "connect": self._limits.connect,
            "read": self._limits.read,
            "write": self._limits.read,
            "pool": remaining(),
        }
        url = request.url
        outgoing = httpcore2.Request(
            request.method,
            httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=_exactly(request),
            extensions={"timeout": timeouts},
        )
        try:
            answer = self._pool.handle_request(outgoing)
            try:
                body = _read_capped(answer, most)
            finally:
                answer.close()
        except OutboundError:
            raise
        except (httpcore2.ConnectError, httpcore2.ConnectTimeout, httpcore2.PoolTimeout) as exc:
            raise _no_connection(exc, url.host) from exc
        except (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError) as exc:
            raise AnswerLost(
                f"the request was sent to {url.host}, but no response arrived ({type(exc).__name__}): Redox "
                "may have processed it"
            ) from exc
        return httpx2.Response(answer.status, headers=answer.headers, content=body, request=request)


def _exactly(request: httpx2.Request) -> Iterator[bytes]:
    """Yield the body, which can be a file. Raises Unsendable during it if the length differs from the header."""
    missing = int(request.headers.get("content-length", 0))
    assert isinstance(request.stream, Iterable)
    for chunk in request.stream:
        missing -= len(chunk)
        if missing < 0:
            break
        yield chunk
    if missing:
        raise Unsendable("the size of the file changed during the upload")


def _read_capped(answer: httpcore2.Response, most: int) -> bytes:
    if 300 <= answer.status < 400:
        raise UnusableAnswer(
            f"the response is a redirect (HTTP {answer.status}), not followed: set the base URL to the final URL",
            status=answer.status,
        )
    encodings = (value for name, value in answer.headers if name.lower() == b"content-encoding")
    if any(encoding.strip().lower() not in (b"", b"identity") for encoding in encodings):
        raise UnusableAnswer("the response is compressed although the request did not allow it", status=answer.status)
    body = bytearray()
    assert isinstance(answer.stream, Iterable)
    for chunk in answer.stream:
        body += chunk
        if len(body) > most:
            raise UnusableAnswer(f"the response is larger than {most} bytes", status=answer.status)
    return bytes(body)


def _no_connection(exc: Exception, host: str) -> OutboundError:
    cause = exc.args[0] if exc.args else exc  # httpcore2 wraps the socket's error, and removes it from the chain
    if isinstance(cause, ssl.SSLCertVerificationError):
        return Untrusted(f"the certificate of {host} is not valid: {cause.verify_message}", not_processed=True)
    if isinstance(exc, httpcore2.PoolTimeout):
        return RedoxUnavailable(
            "all connections of this client are in use: use fewer threads, or allow more connections",
            not_processed=True,
        )
    return RedoxUnavailable(f"no connection to {host} ({type(cause).__name__})", not_processed=True)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _within_deadline(timeout: float | None, late: type[Exception]) -> float:
    left = remaining()
    if left <= 0:
        raise late("out of time")
    return left if timeout is None else min(timeout, left)


class _Stream(httpcore2.NetworkStream):
    """A stream with a deadline for every operation, so that a server that sends single bytes cannot extend the
    exchange.
    """

    def __init__(self, inner: httpcore2.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _within_deadline(timeout, httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, _within_deadline(timeout, httpcore2.WriteTimeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _Stream(
            self._inner.start_tls(ssl_context, server_hostname, _within_deadline(timeout, httpcore2.ConnectTimeout))
        )

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Backend(httpcore2.SyncBackend):
    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        return _Stream(
            super().connect_tcp(
                host, port, _within_deadline(timeout, httpcore2.ConnectTimeout), local_address, socket_options
            )
        )
