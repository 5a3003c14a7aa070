"""Kind `google`: a token that Google signed for Redox's account.

Redox: OAuth 2.0 two-legged with JWT for GCP, and Google Workload Identity Federation. It is a JWT like another, but
that its issuer signs for everybody: what tells Redox from a stranger is the account, by its e-mail or its subject.

Must not believe an e-mail that Google does not call verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from receiver.errors import Unverified
from receiver.protocol.message import Head, Inbound, Verified
from receiver.protocol.registry import Destination, GoogleCredential
from receiver.protocol.verification import bearer
from receiver.protocol.verification.jwt import judge

# Google: OpenID Connect. Both spellings of the issuer are in use; its keys are at the URL, and sign RS256.
ISSUERS: Final = ("https://accounts.google.com", "accounts.google.com")
JWKS_URL: Final = "https://www.googleapis.com/oauth2/v3/certs"
ALGORITHMS: Final = ("RS256",)


class GoogleKind:
    """The verifier of `google`."""

    name = "google"
    by_head = True
    credential = GoogleCredential

    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:  # noqa: ARG002 - Kind's
        """See `bearer.claims`."""
        return bearer.claims(self.name, head, destination)

    def verify(self, inbound: Inbound, destination: Destination, now: datetime) -> Verified:
        """The one credential that matched. Raises Unverified: see `jwt.judge`, `jwt_email_wrong`, `_subject_wrong`."""
        return Verified(credentials=(self._judge(inbound.head, destination, now),), kinds=frozenset({self.name}))

    def _judge(self, head: Head, destination: Destination, now: datetime) -> int:
        credentials = [each for each in destination.credentials if isinstance(each, GoogleCredential)]
        return judge(head, credentials, _check, now)


def _check(claims: Mapping[str, Any], credential: GoogleCredential) -> None:
    if credential.email is not None and (
        claims.get("email") != credential.email or claims.get("email_verified") is not True
    ):
        raise Unverified("jwt_email_wrong")
    if credential.subject is not None and claims.get("sub") != credential.subject:
        raise Unverified("jwt_subject_wrong")
