"""FakeRedox: simulates Redox for one destination, over real HTTP.

It sends the verification token as Redox does, signs if it has a signing secret, and makes the one-time handshake. Must
not depend on how the receiver works. The module `feed` is responsible for order, retries and pauses.
"""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from uuid import uuid4

from receiver.samples.sample import Person, encode, sample
from receiver.simulator.client_auth import Authenticator, HmacAuthenticator, OutgoingRequest
from receiver.simulator.http_connection import HttpConnection, HttpReply
from receiver.simulator.signer import Signer


@dataclass(frozen=True, kw_only=True, slots=True)
class HandshakeResult:
    """The response to a handshake, and the challenge that it must contain."""

    challenge: str
    answer: HttpReply

    @property
    def passed(self) -> bool:
        """The dashboard's current rule: status 200, with the challenge anywhere in the body."""
        return self.answer.status == 200 and self.challenge.encode() in self.answer.body

    @property
    def passed_as_before(self) -> bool:
        """The dashboard's earlier rule: the challenge is the whole body, as plain text."""
        media = self.answer.headers.get("content-type", "")
        return self.passed and self.answer.body == self.challenge.encode() and media.startswith("text/plain")


class FakeRedox:
    """The simulated Redox of one destination. Threads may share it.

    `base_url`: the receiver's URL. `destination`: its name there. `token`: the verification token. `source_id`: the
    source in sample bodies. `bearer`: also send the token as `authorization: Bearer`, as Redox has since about 2021.
    `authenticators`: authenticators that are linked to the destination; they set `authorization` instead. `timeout`:
    seconds for each read; Redox's own timeout is not published.
    """

    def __init__(
        self,
        base_url: str,
        destination: str,
        token: str,
        *,
        source_id: str,
        bearer: bool = True,
        signer: Signer | None = None,
        authenticators: Sequence[Authenticator] = (),
        timeout: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.source_id = source_id
        self.destination = destination
        self._base_url, self._timeout, self._tls = base_url, timeout, tls
        self._target = f"{urlsplit(base_url).path.rstrip('/')}/redox/{quote(destination)}"
        self._token, self._bearer = token, bearer
        self._authenticators = authenticators if signer is None else (HmacAuthenticator(signer=signer), *authenticators)

    def connect(self) -> HttpConnection:
        """Open a new connection. Raises ConfigurationError if the base URL is not valid."""
        return HttpConnection(self._base_url, timeout=self._timeout, tls=self._tls)

    def body(self, kind: str, *, seed: int = 0, test: bool = True, patient: Person | None = None) -> bytes:
        """Return a sample of `kind` from this source, ready to send (receiver.samples.sample)."""
        return encode(sample(kind, seed=seed, source_id=self.source_id, test=test, patient=patient))

    def send(
        self,
        body: bytes | dict[str, Any],
        *,
        headers: Mapping[str, str | None] | None = None,
        lose_answer: bool = False,
        connection: HttpConnection | None = None,
    ) -> HttpReply:
        """POST one body, once. `headers` replace headers with the same name; None removes one.

        `connection`: the connection to use (default: a new one). `lose_answer`: close the connection when the response
        arrives.
        """
        content = body if isinstance(body, bytes) else encode(body)
        return self._request(
            "POST", self._target, content, self._headers(content, headers or {}), connection, lose_answer
        )

    def handshake_post(self) -> HandshakeResult:
        """Send what "Verify & Save" sends: the token and a challenge in a JSON body."""
        challenge = str(uuid4())
        body = json.dumps({"verification-token": self._token, "challenge": challenge}).encode()
        headers = {"content-type": "application/json", "application-name": "RedoxEngine"}
        return HandshakeResult(challenge=challenge, answer=self._request("POST", self._target, body, headers))

    def handshake_get(self, *, token_in_header: bool = False) -> HandshakeResult:
        """Send the same by GET: both in the query string, or the token in its header."""
        challenge = str(uuid4())
        query = (
            {"challenge": challenge} if token_in_header else {"challenge": challenge, "verification-token": self._token}
        )
        headers = {"verification-token": self._token} if token_in_header else {}
        target = f"{self._target}?{urlencode(query)}"
        return HandshakeResult(challenge=challenge, answer=self._request("GET", target, None, headers))

    def _headers(self, body: bytes, changes: Mapping[str, str | None]) -> dict[str, str]:
        headers = {"content-type": "application/json", "verification-token": self._token}
        if self._bearer:
            headers["authorization"] = f"Bearer {self._token}"
        for authenticator in self._authenticators:
            headers |= authenticator.headers(
                OutgoingRequest(
                    method="POST", host=urlsplit(self._base_url).netloc, target=self._target, headers=headers, body=body
                ),
                now=time.time(),
            )
        return {name: value for name, value in (headers | _lower(changes)).items() if value is not None}

    def _request(
        self,
        method: str,
        target: str,
        body: bytes | None,
        headers: Mapping[str, str],
        connection: HttpConnection | None = None,
        lose_answer: bool = False,
    ) -> HttpReply:
        with nullcontext(connection) if connection is not None else self.connect() as used:
            return used.request(method, target, body=body, headers=headers, lose_answer=lose_answer)


def _lower(headers: Mapping[str, str | None]) -> dict[str, str | None]:
    """Convert names to lower case, so that "Redox-Signature" replaces "redox-signature"."""
    return {name.lower(): value for name, value in headers.items()}
