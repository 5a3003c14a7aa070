"""A fake Redox API: the server for receiver.outbound, over real sockets, with TLS if an SSL context is passed.

It checks what Redox is documented to check, answers with Redox's documented texts, records requests, and injects faults
on demand. Where Redox documents no text for a rejection (signature, aud, iat, exp, jti), the text is this module's own.
Must not be reachable from another machine. Must not be used for anything but tests and demonstrations.
"""

from __future__ import annotations

import gzip
import io
import json
import secrets
import socket
import ssl
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import parse_qs, urlsplit

import jwt
from werkzeug.formparser import MultiPartParser
from werkzeug.http import parse_options_header

from receiver.protocol.message import QUERIES, response_event

_ASSERTION_TYPE: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_ALGORITHMS: Final = ("RS384", "ES384")
_IAT_WINDOW: Final = 300  # Redox: iat within the last 5 minutes
_SKEW: Final = 10  # Redox: 10 s of skew allowed
_LARGEST_MESSAGE: Final = 40 * 1024 * 1024
_LARGEST_UPLOAD: Final = 30 * 1024 * 1024
_BOMB_INFLATED: Final = 100 * 1024 * 1024


class Fault(Enum):
    """A fault to inject."""

    SERVER_ERROR = auto()  # 500
    BAD_GATEWAY = auto()  # 502
    UNAVAILABLE = auto()  # 503
    GATEWAY_TIMEOUT = auto()  # 504
    RATE_LIMITED = auto()  # 429 with X-RateLimit-Limit, without Retry-After
    UNAUTHORIZED = auto()  # 401 for any token
    GARBAGE = auto()  # 200 with a body that is not JSON
    NOT_HTTP = auto()  # bytes that are not a valid HTTP response
    HUGE = auto()  # 200 and 10 MB
    REDIRECT = auto()  # 307 to `api.redirect_to`
    GZIP_BOMB = auto()  # 200, Content-Encoding: gzip, 100 MB after decompression
    DRIP = auto()  # a response head, one byte every 20 ms, without end
    SILENCE = auto()  # no response; the connection stays open
    DROP_BEFORE = auto()  # the connection is closed before the request is processed
    DROP_AFTER = auto()  # the request is processed, and the connection is closed before the response
    CUT_SHORT = auto()  # processed; half of the response, then the connection is closed


_STATUS: Final = {
    Fault.SERVER_ERROR: 500,
    Fault.BAD_GATEWAY: 502,
    Fault.UNAVAILABLE: 503,
    Fault.GATEWAY_TIMEOUT: 504,
    Fault.RATE_LIMITED: 429,
    Fault.UNAUTHORIZED: 401,
}
_AFTER: Final = {Fault.DROP_AFTER, Fault.CUT_SHORT}


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """A received request. `headers` has lower-case names."""

    method: str
    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    def form(self) -> dict[str, str]:
        """The body as a form. For a repeated field, the first value."""
        return {name: values[0] for name, values in parse_qs(self.body.decode()).items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedApiAnswer:
    """A response: a status, a body (a dict becomes JSON) and additional headers."""

    status: int = 200
    body: dict[str, Any] | str | bytes = field(default=b"", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Grant:
    legacy: bool
    ends: datetime
    refused: bool = False


JWKS = Mapping[str, Any]
Responder = Callable[[dict[str, Any]], dict[str, Any]]


class FakeRedoxApi:
    """The server. Runs on a loopback port (0: any free port) within a `with` block. `base_url` is for the client.

    `requests`: the received requests. `processed`: the accepted Data Model messages. `resources`: the FHIR resources by
    (type, id). `uploads`: the files by URI. `now`: the server's clock. `token_seconds`: the lifetime of tokens. `now`
    and `token_seconds` may be changed while it runs.
    """

    def __init__(
        self,
        *,
        ssl_context: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        token_seconds: float = 300,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.token_seconds = token_seconds
        self.now = now
        self.redirect_to = "https://elsewhere.invalid/"
        self.requests: list[Received] = []
        self.processed: list[dict[str, Any]] = []
        self.resources: dict[tuple[str, str], dict[str, Any]] = {}
        self.uploads: dict[str, bytes] = {}
        self._lock = threading.RLock()
        self._oauth: dict[str, Callable[[], JWKS]] = {}
        self._legacy: dict[str, str] = {}
        self._grants: dict[str, _Grant] = {}
        self._refresh_tokens: dict[str, str] = {}
        self._jtis: set[str] = set()
        self._faults: dict[str, deque[Fault | SimulatedApiAnswer]] = {}
        self._responders: dict[str, Responder] = {}
        self._meta_errors: deque[list[dict[str, Any]]] = deque()
        self._server = _Server((host, port), self, ssl_context)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="fake-redox-api")
        self.base_url = f"{'https' if ssl_context else 'http'}://{host}:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop()
        self._thread.join()

    # Configuration

    def register_oauth(self, client_id: str, jwks: JWKS | Callable[[], JWKS]) -> None:
        """Register an OAuth key: its public keys, or a function that returns them (as Redox does with a JWKS URL)."""
        self._oauth[client_id] = jwks if callable(jwks) else lambda: jwks

    def register_legacy(self, api_key: str, secret: str) -> None:
        """Register a legacy API key."""
        self._legacy[api_key] = secret

    def refuse_tokens(self) -> None:
        """Reject every token issued so far."""
        with self._lock:
            for grant in self._grants.values():
                grant.refused = True

    def forget_refresh_tokens(self) -> None:
        """Invalidate all refresh tokens, as if another process had used them."""
        with self._lock:
            self._refresh_tokens.clear()

    def fail(self, path: str, fault: Fault | SimulatedApiAnswer, *, times: int = 1) -> None:
        """Inject a fault, or send that response, for the next `times` requests at `path` or below it."""
        with self._lock:
            self._faults.setdefault(path, deque()).extend([fault] * times)

    def respond(self, kind: str, responder: Responder) -> None:
        """Answer queries of `kind` (`PatientSearch.Query`) with the result of `responder`, plus Meta."""
        self._responders[kind] = responder

    def refuse_next(self, *errors: dict[str, Any]) -> None:
        """Answer the next message with status 200 and these `Meta.Errors`, and do not accept it."""
        self._meta_errors.append(list(errors))

    def received(self, path: str) -> list[Received]:
        """Return the requests received at `path` or below it."""
        with self._lock:
            return [one for one in self.requests if one.path.startswith(path)]

    # Request handling

    def next_fault(self, path: str) -> Fault | SimulatedApiAnswer | None:
        """Remove and return the next fault at `path`."""
        with self._lock:
            due = [faults for prefix, faults in self._faults.items() if path.startswith(prefix) and faults]
            return due[0].popleft() if due else None

    def answer(self, request: Received) -> SimulatedApiAnswer:
        """Return the response that Redox would send."""
        path = urlsplit(request.path).path
        if request.method == "POST" and path == "/v2/auth/token":
            return self._oauth_token(request)
        if request.method == "POST" and path == "/auth/authenticate":
            return self._authenticate(request)
        if request.method == "POST" and path == "/auth/refreshToken":
            return self._refresh(request)
        grant = self._grant_of(request)
        if grant is None:
            return SimulatedApiAnswer(status=401, body="Unauthorized")
        if path.startswith("/fhir/R4/"):
            return SimulatedApiAnswer(status=403, body="Forbidden") if grant.legacy else self._fhir(request, path)
        if request.method == "POST" and path in ("/endpoint", "/query"):
            return self._message(request)
        if request.method == "POST" and path == "/uploads":
            return self._upload(request)
        return SimulatedApiAnswer(status=404, body="Not Found")

    def _oauth_token(self, request: Received) -> SimulatedApiAnswer:
        if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            return _denied("x-www-form-urlencoded content-type required")
        form = request.form()
        if "grant_type" not in form:
            return _denied("Missing grant_type parameter")
        if form["grant_type"] != "client_credentials":
            return _denied("grant_type must be client_credentials", error="unsupported_grant_type")
        if form.get("client_assertion_type") != _ASSERTION_TYPE or not form.get("client_assertion"):
            return _denied("Missing client assertion")
        denial = self._judge_assertion(form["client_assertion"])
        if denial is not None:
            return denial
        reply = {"access_token": self._grant(legacy=False), "token_type": "Bearer", "expires_in": self.token_seconds}
        if "scope" in form:
            reply["scope"] = form["scope"]
        return SimulatedApiAnswer(body=reply)

    def _judge_assertion(self, assertion: str) -> SimulatedApiAnswer | None:
        try:
            header = jwt.get_unverified_header(assertion)
            claimed = jwt.decode(assertion, options={"verify_signature": False})
        except jwt.InvalidTokenError:
            return _denied("the client assertion is not a valid JWT", error="invalid_client")
        if header.get("alg") not in _ALGORITHMS:
            return _denied("alg must be RS384 or ES384", error="invalid_client")
        if not isinstance(header.get("kid"), str):
            return _denied("JWT header kid property is required")
        known = self._oauth.get(str(claimed.get("iss")))
        keys = {key.get("kid"): key for key in known()["keys"]} if known else {}
        if header["kid"] not in keys:
            return _denied("Public key not found, check client_id, kid and Redox dashboard settings")
        try:
            # Only the signature and the names are checked here. Times are checked below, by this server's own clock.
            key = jwt.PyJWK(dict(keys[header["kid"]]), header["alg"])
            jwt.decode(
                assertion,
                key,
                algorithms=_ALGORITHMS,
                audience=f"{self.base_url}/v2/auth/token",
                issuer=str(claimed["iss"]),
                subject=str(claimed["iss"]),
                options={
                    "require": ["iss", "sub", "aud", "iat", "exp", "jti"],
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                },
            )
        except (jwt.InvalidTokenError, jwt.InvalidKeyError, jwt.PyJWKError) as exc:
            return _denied(f"the client assertion is not valid ({type(exc).__name__})", error="invalid_client")
        now = self.now().timestamp()
        if not isinstance(claimed["iat"], int | float) or not isinstance(claimed["exp"], int | float):
            return _denied("iat and exp must be numbers", error="invalid_client")
        if not now - _IAT_WINDOW - _SKEW <= claimed["iat"] <= now + _SKEW:
            return _denied("iat is not within the last 5 minutes", error="invalid_client")
        if not now - _SKEW <= claimed["exp"] <= claimed["iat"] + _IAT_WINDOW:
            return _denied("exp is past, or more than 300 s after iat", error="invalid_client")
        with self._lock:
            if claimed["jti"] in self._jtis:
                return _denied("jti was already used", error="invalid_client")
            self._jtis.add(claimed["jti"])
        return None

    def _authenticate(self, request: Received) -> SimulatedApiAnswer:
        asked = _json_object(request)
        api_key = str(asked.get("apiKey"))
        secret = self._legacy.get(api_key)
        if secret is None or not secrets.compare_digest(secret.encode(), str(asked.get("secret")).encode()):
            return SimulatedApiAnswer(status=401, body="Invalid API key or secret")
        return self._legacy_reply(api_key)

    def _refresh(self, request: Received) -> SimulatedApiAnswer:
        asked = _json_object(request)
        with self._lock:
            owner = self._refresh_tokens.pop(str(asked.get("refreshToken")), None)
        if owner is None or owner != asked.get("apiKey"):
            return SimulatedApiAnswer(status=401, body="Invalid refresh token")
        return self._legacy_reply(owner)

    def _legacy_reply(self, api_key: str) -> SimulatedApiAnswer:
        refresh_token = secrets.token_urlsafe(16)
        with self._lock:
            self._refresh_tokens[refresh_token] = api_key
        expires = (self.now() + timedelta(seconds=self.token_seconds)).isoformat(timespec="milliseconds")
        return SimulatedApiAnswer(
            body={
                "accessToken": self._grant(legacy=True),
                "expires": expires.replace("+00:00", "Z"),
                "refreshToken": refresh_token,
            }
        )

    def _grant(self, *, legacy: bool) -> str:
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._grants[token] = _Grant(legacy=legacy, ends=self.now() + timedelta(seconds=self.token_seconds))
        return token

    def _grant_of(self, request: Received) -> _Grant | None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        with self._lock:
            grant = self._grants.get(token) if scheme.lower() == "bearer" else None
            return grant if grant and not grant.refused and self.now() < grant.ends else None

    def _message(self, request: Received) -> SimulatedApiAnswer:
        message = _json_object(request)
        claimed = message.get("Meta")
        meta: dict[str, Any] = claimed if isinstance(claimed, dict) else {}
        kind = f"{meta.get('DataModel')}.{meta.get('EventType')}".replace(" ", "")
        destinations = meta.get("Destinations")
        fault = None
        if not meta.get("DataModel") or not meta.get("EventType"):
            fault = "Meta.DataModel and Meta.EventType are required"
        elif not destinations or not all(isinstance(one, dict) and one.get("ID") for one in destinations):
            fault = "Meta.Destinations must name a destination"
        elif kind in QUERIES and len(destinations) != 1:
            fault = "a query has exactly one destination"
        elif (
            len(self._oauth) > 1
            and not (meta.get("Source") or {}).get("ID")
            and "redox-source-id" not in request.headers
        ):
            fault = "Meta.Source.ID is required"
        logs = [{"ID": str(uuid.uuid4()), "AttemptID": str(uuid.uuid4())}]
        if fault is not None:
            errors = [{"ID": 4001, "Text": fault, "Type": "client", "Module": "Endpoint"}]
            return SimulatedApiAnswer(status=400, body={"Meta": {**meta, "Logs": logs, "Errors": errors}})
        with self._lock:
            if self._meta_errors:
                return SimulatedApiAnswer(body={"Meta": {**meta, "Logs": logs, "Errors": self._meta_errors.popleft()}})
            self.processed.append(message)
        if kind not in QUERIES:
            return SimulatedApiAnswer(body={"Meta": {**meta, "Logs": logs}})
        responder = self._responders.get(kind)
        reply = responder(message) if responder else {}
        event = response_event(*kind.split(".", 1))
        return SimulatedApiAnswer(body={"Meta": {**meta, "EventType": event, "Logs": logs}, **reply})

    def _fhir(self, request: Received, path: str) -> SimulatedApiAnswer:
        parts = path.removeprefix("/fhir/R4/").split("/")
        if len(parts) != 4 or parts[1] not in ("Development", "Staging", "Production"):
            return _outcome(404, "not-found")
        resource, rest = parts[2], parts[3]
        if request.method == "GET":
            one = self.resources.get((resource, rest))
            return _outcome(404, "not-found") if one is None else _fhir_answer(one)
        media = request.headers.get("content-type", "").partition(";")[0]
        if rest == "_search":
            if media != "application/x-www-form-urlencoded":
                return _outcome(415, "not-supported")
            found = [{"resource": one} for (kind, _), one in self.resources.items() if kind == resource]
            return _fhir_answer({"resourceType": "Bundle", "type": "searchset", "total": len(found), "entry": found})
        if not rest.startswith("$"):
            return _outcome(404, "not-found")
        if media != "application/fhir+json":
            return _outcome(415, "not-supported")
        if not isinstance(_json_object(request).get("resourceType"), str):
            return _outcome(400, "structure")
        reply = {"resourceType": "MessageHeader", "response": {"code": "ok", "identifier": str(uuid.uuid4())}}
        return _fhir_answer({"resourceType": "Bundle", "type": "message", "entry": [{"resource": reply}]})

    def _upload(self, request: Received) -> SimulatedApiAnswer:
        media, options = parse_options_header(request.headers.get("content-type"))
        if media != "multipart/form-data" or not options.get("boundary"):
            return SimulatedApiAnswer(status=400, body="multipart/form-data required")
        parser = MultiPartParser(stream_factory=lambda *_, **__: io.BytesIO())
        try:
            _, files = parser.parse(io.BytesIO(request.body), options["boundary"].encode(), len(request.body))
        except ValueError:
            return SimulatedApiAnswer(status=400, body="multipart/form-data required")
        file = files.get("file")
        if file is None:
            return SimulatedApiAnswer(status=400, body="Missing file")
        content = file.stream.read()
        if len(content) > _LARGEST_UPLOAD:
            return SimulatedApiAnswer(status=413, body="Payload Too Large")
        uri = f"{self.base_url}/uploads/{uuid.uuid4()}"
        self.uploads[uri] = content
        return SimulatedApiAnswer(body={"URI": uri})


def _denied(description: str, *, error: str = "invalid_request") -> SimulatedApiAnswer:
    """RFC 6749 5.2: invalid_client is a 401; the other errors are a 400."""
    return SimulatedApiAnswer(
        status=401 if error == "invalid_client" else 400,
        body={
            "error": error,
            "error_description": description,
            "error_uri": "https://www.rfc-editor.org/rfc/rfc6749#section-5.2",
        },
    )


def _outcome(status: int, code: str) -> SimulatedApiAnswer:
    issue = {"severity": "error", "code": code, "diagnostics": "the fake Redox API rejects this request"}
    return _fhir_answer({"resourceType": "OperationOutcome", "issue": [issue]}, status)


def _fhir_answer(resource: dict[str, Any], status: int = 200) -> SimulatedApiAnswer:
    return SimulatedApiAnswer(status=status, body=resource, headers={"Content-Type": "application/fhir+json"})


def _json_object(request: Received) -> dict[str, Any]:
    try:
        body = request.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], api: FakeRedoxApi, ssl_context: ssl.SSLContext | None) -> None:
        self.api = api
        self.stopping = threading.Event()
        self._ssl_context = ssl_context
        self._open: set[socket.socket] = set()
        super().__init__(address, _ApiConnection)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, peer = super().get_request()
        if self._ssl_context is not None:  # the handshake is done in the connection's thread
            connection = self._ssl_context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        self._open.add(connection)
        return connection, peer

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of clients that disconnect or reject the certificate. Report all other errors."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        for connection in list(self._open):
            with suppress(OSError):  # its own thread has already closed it
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        self.server_close()


class _ApiConnection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one response, one write
    server: _Server

    def setup(self) -> None:
        if isinstance(self.request, ssl.SSLSocket):
            self.request.settimeout(10)
            self.request.do_handshake()
            self.request.settimeout(None)
        super().setup()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 — the base class's name
        """Log nothing: a URL may name a patient."""

    def _serve(self) -> None:
        api = self.server.api
        length = int(self.headers.get("Content-Length") or 0)
        if length > _LARGEST_MESSAGE or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            self._write(SimulatedApiAnswer(status=413 if length else 411))
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Received(method=self.command, path=self.path, headers=headers, body=self.rfile.read(length))
        if len(request.body) < length:
            self.close_connection = True
            return
        with api._lock:
            api.requests.append(request)
        fault = api.next_fault(self.path)
        if isinstance(fault, Fault):
            self._misbehave(fault, api.answer(request) if fault in _AFTER else None)
        else:
            self._write(api.answer(request) if fault is None else fault)

    def _misbehave(self, fault: Fault, answered: SimulatedApiAnswer | None) -> None:
        if fault in _STATUS:
            limit = {"X-RateLimit-Limit": "7500"} if fault is Fault.RATE_LIMITED else {}
            self._write(
                SimulatedApiAnswer(status=_STATUS[fault], body="the fake Redox API fails on demand", headers=limit)
            )
        elif fault is Fault.GARBAGE:
            self._write(SimulatedApiAnswer(body="<html>this is not JSON</html>"))
        elif fault is Fault.HUGE:
            self._write(SimulatedApiAnswer(body=b" " * (10 * 1024 * 1024)))
        elif fault is Fault.REDIRECT:
            self._write(SimulatedApiAnswer(status=307, headers={"Location": self.server.api.redirect_to}))
        elif fault is Fault.GZIP_BOMB:
            self._write(
                SimulatedApiAnswer(body=gzip.compress(bytes(_BOMB_INFLATED), 1), headers={"Content-Encoding": "gzip"})
            )
        else:
            self._close_early(fault, answered)

    def _close_early(self, fault: Fault, answered: SimulatedApiAnswer | None) -> None:
        self.close_connection = True
        if fault is Fault.NOT_HTTP:
            self.wfile.write(b"\x15\x03\x01 this is not HTTP\r\n\r\n")
        elif fault is Fault.SILENCE:
            self.server.stopping.wait()
        elif fault is Fault.DRIP:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not self.server.stopping.wait(0.02):
                self.wfile.write(b"x")
                self.wfile.flush()
        elif fault is Fault.CUT_SHORT:
            assert answered is not None
            whole = self._bytes_of(answered)
            self.wfile.write(whole[: len(whole) - 5])

    def _write(self, answered: SimulatedApiAnswer) -> None:
        self.wfile.write(self._bytes_of(answered))
        self.wfile.flush()

    def _bytes_of(self, answered: SimulatedApiAnswer) -> bytes:
        body = answered.body
        media = "application/json" if isinstance(body, dict) else "text/plain; charset=utf-8"
        text = json.dumps(body) if isinstance(body, dict) else body
        content = text.encode() if isinstance(text, str) else text
        headers = {
            "Date": format_datetime(self.server.api.now(), usegmt=True),
            "Content-Type": media,
            "Content-Length": str(len(content)),
            **answered.headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        reason = self.responses[answered.status][0]
        return f"HTTP/1.1 {answered.status} {reason}\r\n{head}\r\n".encode("latin-1") + content
