"""The pipeline: destinations, tokens, sources and queries, from bytes to a verdict."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from receiver.errors import BadTransfer
from receiver.pipeline import UNPROVED_BODY, Admitted, HeadAccepted, Refused, check_head, replayed
from tests.protocol.made_up import BODY, NOW, SOURCE, destination, head, inbound, registry, signing, token
from tests.support.verdicts import FIRST, MAIN, SECOND, TOKEN, UUID, Headers, accepted, described, handshake, receive


class TestDestination:
    """Unknown and disabled destinations, and whose credentials count."""

    @pytest.mark.parametrize(
        ("method", "headers", "body"), [("POST", TOKEN, BODY), ("POST", {}, handshake()), ("GET", TOKEN, b"")]
    )
    def test_unknown_or_disabled(self, method: Any, headers: Headers, body: bytes) -> None:
        """An unknown or disabled destination is refused like a wrong token, before the body is read."""
        closed = registry(destination(token(), enabled=False))
        for known, name, reason in ((closed, "main", "destination_disabled"), (closed, "other", "destination_unknown")):
            request = inbound(body, headers, method=method, name=name)
            refused = check_head(request.head, known, NOW)
            assert isinstance(refused, Refused)
            assert (refused.reason, refused.status, refused.body) == (reason, 401, None)

    def test_credentials_are_its_own(self) -> None:
        """The token of one destination is wrong at another."""
        known = registry(MAIN, destination(token("second", id=2), name="other"))
        assert isinstance(check_head(head(TOKEN), known, NOW), HeadAccepted)
        refused = check_head(head(TOKEN, name="other"), known, NOW)
        assert isinstance(refused, Refused)
        assert described(refused) == "refused 401 token_wrong"


class TestTransfer:
    """Refusals of bodies that do not arrive."""

    def test_a_body_without_a_credential(self) -> None:
        """A body larger than a handshake, without a sufficient credential in the head, is a 401 and is not parsed."""
        for at, headers in ((MAIN, {}), (destination(token(), signing(), require=("hmac+token",)), TOKEN)):
            refused = receive(inbound(handshake() + b" " * UNPROVED_BODY, headers), at)
            assert described(refused) == "refused 401 credential_missing"
            assert isinstance(refused, Refused)
            assert refused.destination is at
            assert refused.body is None

    def test_a_bad_transfer(self) -> None:
        """A body that did not arrive whole keeps its reason and status."""
        refused = accepted({}, MAIN).not_received(BadTransfer("body_too_large", status_hint=413))
        assert (described(refused), refused.destination) == ("refused 413 body_too_large", MAIN)
        assert accepted(TOKEN, MAIN).not_received(BadTransfer("body_incomplete")).status == 400


# Headers, and the reason why they are refused.
BAD_TOKENS: dict[str, tuple[Headers, str]] = {
    "none": ({}, "credential_missing"),
    "wrong": ({"verification-token": "x" * 36}, "token_wrong"),
    "empty": ({"verification-token": ""}, "token_wrong"),
    "non-ASCII": ({"verification-token": "tok\xe9n"}, "token_wrong"),
    "right, then wrong": ({"verification-token": f"{FIRST},{SECOND}"}, "token_wrong"),
    "wrong, then right": ({"verification-token": f"{SECOND},{FIRST}"}, "token_wrong"),
    "padded": ({"verification-token": f" {FIRST} "}, "token_wrong"),
    "other case": ({"verification-token": FIRST.title()}, "token_wrong"),
    "a prefix": ({"verification-token": FIRST[:-1]}, "token_wrong"),
    "another opaque Bearer": ({**TOKEN, "authorization": f"Bearer {SECOND}"}, "bearer_differs"),
    "a wrong Bearer alone": ({"authorization": f"Bearer {SECOND}"}, "token_wrong"),
    "in a header of another name": ({"x-verification-token": FIRST}, "credential_missing"),
    "from a forged address": ({"x-forwarded-for": "127.0.0.1", "x-real-ip": "::1"}, "credential_missing"),
}


class TestToken:
    """Bad inputs: the token."""

    @pytest.mark.parametrize(("headers", "reason"), BAD_TOKENS.values(), ids=BAD_TOKENS)
    @pytest.mark.parametrize("body", [BODY, b"", b"{}", BODY + b" " * UNPROVED_BODY])
    def test_bad(self, headers: Headers, reason: str, body: bytes) -> None:
        """Every wrong token is a 401 with its reason, whatever the body."""
        assert described(receive(inbound(body, headers))) == f"refused 401 {reason}"

    def test_in_the_query_of_a_post(self) -> None:
        """A token in the query string counts only for a handshake by GET."""
        for body in (BODY, handshake(given_token=None)):
            request = inbound(body, query=f"verification-token={FIRST}&challenge={UUID}")
            assert described(receive(request)) == "refused 401 credential_missing"

    def test_while_one_rotates(self) -> None:
        """The previous token is accepted until it ends, and the verdict names the one used."""
        at = destination(token("first", id=1, expires_at=NOW + timedelta(hours=1)), token("second", id=2))
        for given_token, credential in ((FIRST, 1), (SECOND, 2)):
            admitted = receive(inbound(headers={"verification-token": given_token}), at)
            assert isinstance(admitted, Admitted)
            assert admitted.verified.credentials == (credential,)

    @pytest.mark.parametrize(
        ("credential", "reason"), [(token(revoked=True), "token_revoked"), (token(expires_at=NOW), "token_expired")]
    )
    def test_revoked_or_expired(self, credential: Any, reason: str) -> None:
        """An expired token is accepted neither for a message nor for a handshake."""
        at = destination(credential, token("second", id=2))
        for request in (
            inbound(headers=TOKEN),
            inbound(handshake()),
            inbound(handshake(given_token=None), TOKEN),
            inbound(b"", TOKEN, method="GET", query=f"challenge={UUID}"),
        ):
            assert described(receive(request, at)) == f"refused 401 {reason}"

    def test_beside_a_jwt(self) -> None:
        """A token in its own header suffices though `Authorization` holds something else."""
        assert described(receive(inbound(headers={**TOKEN, "authorization": "Bearer a.b.c"}))) == "admitted"
        assert (
            described(receive(inbound(headers={"authorization": "Bearer a.b.c"}))) == "refused 401 credential_missing"
        )


def test_what_authenticates_a_body_before_it_is_read() -> None:
    """A token authenticates the body. A handshake by GET has none."""
    assert accepted(TOKEN, MAIN).authenticated is True
    asked = check_head(head(TOKEN, method="GET"), registry(MAIN), NOW)
    assert isinstance(asked, HeadAccepted)
    assert (asked.whole, asked.authenticated) == (False, False)


class TestSource:
    """After verification: whether the source is allowed."""

    @pytest.mark.parametrize(
        ("claimed", "normal", "reason"),
        [
            (
                b'{"ID":"11111111-2222-4333-8444-555555555555"}',
                "11111111-2222-4333-8444-555555555555",
                "source_unknown",
            ),
            (b'{"ID":"Ann Example, born 1950"}', "Ann Example, born 1950", "source_unknown"),
            (b"null", None, "source_missing"),
        ],
    )
    def test_refused(self, claimed: bytes, normal: str | None, reason: str) -> None:
        """A 403 has the proof and the claimed id as it was sent."""
        body = BODY.replace(b'{"ID":"%b"}' % SOURCE.encode(), claimed)
        refused = receive(inbound(body, TOKEN))
        assert isinstance(refused, Refused)
        assert (refused.status, refused.reason, refused.claimed_source) == (403, reason, normal)
        assert refused.verified is not None
        assert refused.verified.credentials == (1,)
        assert refused.query is None
        assert refused.body is body
        assert normal is None or normal not in repr(refused)

    @pytest.mark.parametrize(
        ("policies", "expected"),
        [
            ({"sources": {}, "on_unknown_source": "quarantine"}, "quarantined source_unknown"),
            ({"sources": {}, "sources_policy": "any"}, "admitted"),
            ({"sources": {SOURCE: False}}, "refused 403 source_disabled"),
        ],
    )
    def test_policies(self, policies: dict[str, Any], expected: str) -> None:
        """The destination's policy for sources applies. A quarantined message is parsed all the same."""
        verdict = receive(inbound(headers=TOKEN), destination(token(), **policies))
        assert described(verdict) == expected
        assert isinstance(verdict, Refused | Admitted)
        assert isinstance(verdict, Refused) or verdict.message is not None

    @pytest.mark.parametrize(
        ("policy", "expected"),
        [("accept", "admitted"), ("quarantine", "quarantined test_message"), ("reject", "refused 403 test_rejected")],
    )
    def test_tests(self, policy: str, expected: str) -> None:
        """The destination's policy for test messages applies."""
        body = BODY.replace(b'"Source"', b'"Test":true,"Source"')
        assert described(receive(inbound(body, TOKEN), destination(token(), test_messages=policy))) == expected


class TestQuery:
    """Queries: the sender waits for the answer."""

    body = BODY.replace(b"PatientAdmin", b"PatientSearch").replace(b"Arrival", b"Query")

    def test_a_replay(self) -> None:
        """A repeated signed query is refused; its body is only for its digest."""
        admitted = receive(inbound(self.body, TOKEN))
        assert isinstance(admitted, Admitted)
        refused = replayed(admitted)
        assert (refused.reason, refused.status, refused.body) == ("signature_replayed", 401, self.body)

    def test_admitted(self) -> None:
        """An admitted query has its kind as `query`; other messages do not."""
        verdicts = [receive(inbound(body, TOKEN)) for body in (self.body, BODY)]
        assert [verdict.query for verdict in verdicts if isinstance(verdict, Admitted)] == ["PatientSearch.Query", None]

    def test_refused(self) -> None:
        """A query from an unknown source is refused with any policy, and keeps its kind for the reply."""
        refused = receive(inbound(self.body, TOKEN), destination(token(), sources={}, on_unknown_source="quarantine"))
        assert isinstance(refused, Refused)
        assert (refused.status, refused.query) == (403, "PatientSearch.Query")

    def test_unreadable(self) -> None:
        """A query with duplicate keys is quarantined, and keeps its kind for the reply."""
        verdict = receive(inbound(self.body[:-1] + b',"x":1,"x":2}', TOKEN))
        assert isinstance(verdict, Admitted)
        assert (verdict.quarantine, verdict.query) == ("top_duplicate_key", "PatientSearch.Query")

    def test_unproved(self) -> None:
        """A query that is not authentic does not get a reply in Redox's form."""
        refused = receive(inbound(self.body))
        assert isinstance(refused, Refused)
        assert refused.query is None


# Bytes in all states of being a message: noise, JSON of any shape, and a message with a few bytes damaged.
