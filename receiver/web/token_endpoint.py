"""The token endpoint: receives a token request, decides it, and replies. A coroutine, like receiver.web.endpoint.

| event                                                    | reply                                           |
|----------------------------------------------------------|-------------------------------------------------|
| granted                                                  | 200, after its audit row has committed          |
| denied: the client, for any cause; the request           | 401; 400                                        |
| denied to a network with many wrong secrets              | 429                                             |
| an assertion that was used before                        | 401                                             |
| a transfer coding that is not chunked                    | 501                                             |
| cannot be recorded; an unexpected error                  | 503                                             |

Must not know a framework, and must not decide (receiver.protocol.tokens does). Must not refuse a right secret because
of earlier wrong ones: strangers who share an address with Redox, or forge one, could stop a feed. The limit slows wrong
secrets only, by network; the length of a secret protects it from guessing.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol

import msgspec
import structlog

from receiver.errors import BadTransfer, Unavailable
from receiver.protocol import tokens
from receiver.protocol.message import Head, Inbound, Nonce, Reply
from receiver.protocol.registry import Destination, Registry
from receiver.protocol.tokens import Denied, Granted
from receiver.web.body import Transfer, receive
from receiver.web.replies import JSON, UNAVAILABLE
from receiver.web.runtime import Runtime, recorded
from receiver.window_counter import MINUTE, WindowCounter

log: Final = structlog.get_logger(__name__)

# Wrong secrets from one network within a minute until it gets 429.
GUESSES: Final = 10
# Networks that are counted at once. In a flood from more, those that were silent longest are forgotten.
_NETWORKS: Final = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRefusal:
    """A token request that was denied, for the audit. `destination`: None if there is none of that name."""

    head: Head
    destination: Destination | None
    denied: Denied


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenIssue:
    """A token that is about to be issued, for the audit."""

    head: Head
    destination: Destination
    granted: Granted


class Records(Protocol):
    """What the token endpoint needs of the storage."""

    def first(self, once: Sequence[Nonce]) -> bool:
        """Mark the nonces as seen; return whether none of them was seen before. Raises Unavailable."""

    def issued(self, issue: TokenIssue) -> Future[None]:
        """Write an audit row. The future is done after the COMMIT, or raises Unavailable."""

    def not_issued(self, refusal: TokenRefusal) -> None:
        """Write an audit row later; does not wait."""


class TokenEndpoint:
    """Serves token requests. Safe in threads. `network` returns the network that an address counts against."""

    def __init__(
        self, *, registry: Callable[[], Registry | None], records: Records, network: Callable[[str], str]
    ) -> None:
        self._registry = registry
        self._records = records
        self._network = network
        self._guesses: WindowCounter[str] = WindowCounter(MINUTE, keys=_NETWORKS)
        self._counting = threading.Lock()

    async def serve(self, head: Head, transfer: Transfer, runtime: Runtime) -> Reply:
        """The reply to a POST. Raises no errors of its own."""
        try:
            return await self._serve(head, transfer, runtime)
        except Unavailable as exc:
            log.warning("token.unavailable", reason=str(exc))
        except Exception:
            log.exception("token.failed")
        return _closing(UNAVAILABLE)

    async def _serve(self, head: Head, transfer: Transfer, runtime: Runtime) -> Reply:
        registry = self._registry()
        if registry is None:
            raise Unavailable("registry_never_loaded")
        destination = registry.destinations.get(head.destination)
        if destination is None or not destination.enabled:
            denied = Denied(
                error="invalid_client", reason="destination_unknown" if destination is None else "destination_disabled"
            )
            return _closing(self._deny(head, destination, denied))
        try:
            # Small enough to need no reservation: slow strangers cannot keep a client from its token.
            body = await receive(transfer, limit=tokens.MAX_REQUEST)
        except BadTransfer as exc:
            reply = self._deny(head, destination, Denied(error="invalid_request", reason=exc.reason))
            return _closing(replace(reply, status=501) if exc.status_hint == 501 else reply)
        if body is None:
            denied = Denied(error="invalid_request", reason="token_request_too_large")
            return _closing(self._deny(head, destination, denied))
        decision = tokens.decide(
            Inbound(head=head, body=body), destination, head.received_at, jti=secrets.token_urlsafe(16)
        )
        once = decision.once if isinstance(decision, Granted) else None
        if once is not None and not await runtime.run_in_thread(partial(self._records.first, (once,))):
            decision = Denied(error="invalid_client", reason="token_assertion_replayed", credential=decision.credential)
        if isinstance(decision, Denied):
            return self._deny(head, destination, decision)
        await recorded(runtime, self._records.issued(TokenIssue(head=head, destination=destination, granted=decision)))
        return _json(200, decision.body())

    def _deny(self, head: Head, destination: Destination | None, denied: Denied) -> Reply:
        self._records.not_issued(TokenRefusal(head=head, destination=destination, denied=denied))
        if denied.guess and self._guesses_too_often(self._network(head.peer)):
            return _json(429, {"error": "slow_down"}, retry_after=int(MINUTE))
        return _json(denied.status, {"error": denied.error})

    def _guesses_too_often(self, network: str) -> bool:
        """Count a wrong secret; return whether the network has sent too many within a minute."""
        with self._counting:
            self._guesses.roll(time.monotonic())
            return self._guesses.add(network) > GUESSES


def _json(status: int, body: dict[str, Any], *, retry_after: int | None = None) -> Reply:
    return Reply(status=status, body=msgspec.json.encode(body), media=JSON, retry_after=retry_after)


def _closing(reply: Reply) -> Reply:
    """The reply with a close: a part of the request may be unread, so the next bytes are not a request."""
    return replace(reply, close=True)
