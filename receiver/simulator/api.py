"""A fake Redox API: the server for receiver.outbound, over real sockets, with TLS if an SSL context is passed.

It checks what Redox is documented to check, records requests, and injects faults on demand
(receiver.fault_injection.api_faults). Must not be reachable from another machine. Must not be used for anything but
tests and demonstrations.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from receiver.fault_injection.api_faults import ApiFault, ApiFaultQueue
from receiver.simulator import api_fhir
from receiver.simulator.api_data_model import DataModelApi, Responder, upload
from receiver.simulator.api_exchange import Received, SimulatedApiAnswer
from receiver.simulator.api_server import ApiServer
from receiver.simulator.api_tokens import JWKS, ApiTokens


class FakeRedoxApi:
    """The server. Runs on a loopback port (0: any free port) within a `with` block. `base_url` is for the client.

    `requests`: the received requests. `resources`: the FHIR resources by (type, id). `uploads`: the files by URI.
    `now`: the server's clock. `token_seconds`: the lifetime of tokens. Both may be changed while it runs.
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
        self.resources: dict[tuple[str, str], dict[str, Any]] = {}
        self.uploads: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._faults: ApiFaultQueue[ApiFault | SimulatedApiAnswer] = ApiFaultQueue()
        self._data_model = DataModelApi()
        self._tokens = ApiTokens(self)
        self._server = ApiServer((host, port), self, ssl_context)
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

    @property
    def processed(self) -> list[dict[str, Any]]:
        """The accepted Data Model messages."""
        return self._data_model.processed

    def register_oauth(self, client_id: str, jwks: JWKS | Callable[[], JWKS]) -> None:
        """Register an OAuth key: its public keys, or a function that returns them (as Redox does with a JWKS URL)."""
        self._tokens.register_oauth(client_id, jwks)

    def register_legacy(self, api_key: str, secret: str) -> None:
        """Register a legacy API key."""
        self._tokens.register_legacy(api_key, secret)

    def refuse_tokens(self) -> None:
        """Reject every token issued so far."""
        self._tokens.refuse_all()

    def forget_refresh_tokens(self) -> None:
        """Invalidate all refresh tokens, as if another process had used them."""
        self._tokens.forget_refresh_tokens()

    def fail(self, path: str, fault: ApiFault | SimulatedApiAnswer, *, times: int = 1) -> None:
        """Inject a fault, or send that response, for the next `times` requests at `path` or below it."""
        self._faults.add(path, fault, times)

    def respond(self, kind: str, responder: Responder) -> None:
        """Answer queries of `kind` (`PatientSearch.Query`) with the result of `responder`, plus Meta."""
        self._data_model.respond(kind, responder)

    def refuse_next(self, *errors: dict[str, Any]) -> None:
        """Answer the next message with status 200 and these `Meta.Errors`, and do not accept it."""
        self._data_model.refuse_next(list(errors))

    def received(self, path: str) -> list[Received]:
        """Return the requests received at `path` or below it."""
        with self._lock:
            return [one for one in self.requests if one.path.startswith(path)]

    # Request handling

    def record(self, request: Received) -> None:
        """Add a request to `requests`."""
        with self._lock:
            self.requests.append(request)

    def next_fault(self, path: str) -> ApiFault | SimulatedApiAnswer | None:
        """Remove and return the next fault at `path`."""
        return self._faults.take(path)

    def answer(self, request: Received) -> SimulatedApiAnswer:
        """Return the response that Redox would send."""
        path = urlsplit(request.path).path
        issued = self._tokens.answer(request, path)
        if issued is not None:
            return issued
        grant = self._tokens.grant_of(request)
        if grant is None:
            return SimulatedApiAnswer(status=401, body="Unauthorized")
        if path.startswith("/fhir/R4/"):
            if grant.legacy:
                return SimulatedApiAnswer(status=403, body="Forbidden")
            return api_fhir.answer(request, path, self.resources)
        if request.method == "POST" and path in ("/endpoint", "/query"):
            return self._data_model.answer(request, source_required=self._tokens.oauth_clients > 1)
        if request.method == "POST" and path == "/uploads":
            return upload(request, self.base_url, self.uploads)
        return SimulatedApiAnswer(status=404, body="Not Found")
