"""The pipeline: handshakes, by POST and GET."""

from __future__ import annotations

import pytest

from receiver.pipeline import Challenged
from receiver.protocol.message import Inbound
from tests.protocol.made_up import destination, inbound, signing, token
from tests.support.verdicts import FIRST, META, SECOND, TOKEN, UUID, described, handshake, receive

HARMLESS = "refused 400 challenge_malformed"
# Challenges that are never echoed, also with the right token.
BAD_CHALLENGES: dict[str, object] = {
    "HTML": "<script>alert(1)</script>",
    "CRLF": "a\r\nSet-Cookie: a=b",
    "long": "a" * 5_000,
    "an array": [UUID],
    "an object": {"challenge": UUID},
    "null": "\0",
    "empty": "",
    "a number": 7,
    "a space": "a b",
    "missing": None,
}


class TestHandshake:
    """Handshakes, valid and not."""

    @pytest.mark.parametrize(
        "request_",
        [
            inbound(handshake()),
            inbound(handshake(), TOKEN),
            inbound(handshake(given_token=None), TOKEN),
            inbound(handshake(), {**TOKEN, "authorization": f"Bearer {FIRST}", "application-name": "RedoxEngine"}),
            inbound(b"", method="GET", query=f"challenge={UUID}&verification-token={FIRST}"),
            inbound(b"", TOKEN, method="GET", query=f"challenge={UUID}"),
            inbound(b"", {"authorization": f"Bearer {FIRST}"}, method="GET", query=f"challenge={UUID}"),
            inbound(handshake(given_token=None), {"authorization": f"bearer  {FIRST}"}),
            inbound(b"ignored", TOKEN, method="GET", query=f"challenge={UUID}&verification-token={FIRST}"),
        ],
    )
    @pytest.mark.parametrize("require", [("token",), ("hmac",), ("hmac+token",), ("hmac", "token"), ()])
    def test_right(self, request_: Inbound, require: tuple[str, ...]) -> None:
        """With the right token the challenge is echoed, wherever both are, and whatever messages require."""
        at = destination(token(id=5), signing(), require=require)
        challenged = receive(request_, at)
        assert challenged == Challenged(challenge=UUID, head=request_.head, destination=at, credential=5)

    def test_replayed(self) -> None:
        """The same handshake again gets the same reply."""
        assert receive(inbound(handshake())) == receive(inbound(handshake()))

    @pytest.mark.parametrize(
        ("request_", "reason"),
        [
            (inbound(handshake(given_token="x" * 36)), "token_wrong"),
            (inbound(handshake(given_token="")), "token_wrong"),
            (inbound(handshake(given_token="tökén")), "token_wrong"),
            (inbound(handshake(given_token=5)), "credential_missing"),
            (inbound(handshake(given_token=[FIRST])), "credential_missing"),
            (inbound(handshake(given_token=None)), "credential_missing"),
            (inbound(handshake(), {"verification-token": SECOND}), "token_wrong"),
            (inbound(handshake(), {"authorization": f"Bearer {SECOND}"}), "token_wrong"),
            (inbound(b"", method="GET"), "credential_missing"),
            (inbound(b"", method="GET", query=f"challenge={UUID}"), "credential_missing"),
            (inbound(b"", method="GET", query=f"challenge={UUID}&verification-token=x"), "token_wrong"),
            (inbound(b"", method="GET", query=f"challenge={UUID}&verification-token="), "token_wrong"),
            (inbound(b"", {"verification-token": "x"}, method="GET", query=f"challenge={UUID}"), "token_wrong"),
            (
                inbound(b"", {"authorization": f"Bearer {SECOND}"}, method="GET", query=f"challenge={UUID}"),
                "token_wrong",
            ),
            (
                inbound(b"", {"authorization": f"Basic {FIRST}"}, method="GET", query=f"challenge={UUID}"),
                "credential_missing",
            ),
            (
                inbound(
                    b"",
                    {"verification-token": "x", "authorization": f"Bearer {FIRST}"},
                    method="GET",
                    query=f"challenge={UUID}",
                ),
                "token_wrong",
            ),
            (inbound(b"", TOKEN, method="GET", query=f"challenge={UUID}&verification-token=x"), "token_wrong"),
            (
                inbound(
                    b"", {"verification-token": "x"}, method="GET", query=f"challenge={UUID}&verification-token={FIRST}"
                ),
                "token_wrong",
            ),
        ],
    )
    def test_wrong(self, request_: Inbound, reason: str) -> None:
        """Without the right token, or with a wrong one in addition, nothing is echoed: 401."""
        assert described(receive(request_)) == f"refused 401 {reason}"

    def test_without_a_token_of_the_destination(self) -> None:
        """Without a registered token no handshake succeeds, not even with another credential."""
        at = destination(signing(), require=("hmac",))
        assert described(receive(inbound(handshake()), at)) == "refused 401 token_wrong"
        # openssl dgst -sha256 -hmac "$SECRET" -binary handshake | base64, the first secret.
        signed = {"redox-signature": "Ux+A73jp9HSN/IHgbQzPZ+G4C9lySBtfhg5tnFWt2DA="}
        assert described(receive(inbound(handshake(), signed), at)) == "quarantined no_meta"

    @pytest.mark.parametrize("challenge", BAD_CHALLENGES.values(), ids=BAD_CHALLENGES)
    def test_bad_challenges(self, challenge: object) -> None:
        """A challenge that is unsafe to echo is a 400, or a 401 without a token."""
        assert described(receive(inbound(handshake(challenge)))) == HARMLESS
        assert described(receive(inbound(handshake(challenge, None)))) == "refused 401 credential_missing"

    @pytest.mark.parametrize(
        "query",
        [
            "challenge=%3Cscript%3E",
            "challenge=a%0d%0ab",
            "challenge=",
            "challenge=%ff",
            "",
            "challenge=" + "a" * 1_000_000,
            "&".join(["challenge=a"] * 1_000),
        ],
    )
    def test_bad_challenges_by_get(self, query: str) -> None:
        """The same for a query string, with the right token in the header."""
        assert described(receive(inbound(b"", TOKEN, method="GET", query=query))) == HARMLESS

    def test_a_megabyte(self) -> None:
        """A challenge of 1 MB without a token in the head is not read; with one it is quarantined as a message."""
        body = handshake("a" * 1_000_000)
        assert described(receive(inbound(body))) == "refused 401 credential_missing"
        assert described(receive(inbound(body, TOKEN))) == "quarantined no_meta"

    @pytest.mark.parametrize("challenge", BAD_CHALLENGES.values(), ids=BAD_CHALLENGES)
    def test_a_message_that_looks_like_one(self, challenge: object) -> None:
        """A body like a bad handshake whose head is authentic is quarantined: it may be a message of an unknown form.

        A refusal would pause the whole feed.
        """
        for given_token in (None, FIRST, SECOND):
            assert described(receive(inbound(handshake(challenge, given_token), TOKEN))) == "quarantined no_meta"

    def test_with_a_wrong_token_in_the_body_nothing_is_echoed(self) -> None:
        """Right in the head, wrong in the body: authentic, so quarantined, but the challenge is not echoed."""
        assert described(receive(inbound(handshake(given_token=SECOND), TOKEN))) == "quarantined no_meta"

    def test_what_does_not_suffice_is_not_kept(self) -> None:
        """If messages require more than a token, a bad handshake with the right token is refused."""
        at = destination(token(), signing(), require=("hmac+token",))
        assert described(receive(inbound(handshake("a b"), TOKEN), at)) == HARMLESS
        assert described(receive(inbound(handshake("a b", SECOND), TOKEN), at)) == "refused 401 token_wrong"

    def test_a_message_with_a_challenge_is_a_message(self) -> None:
        """A message with a member `challenge` is a message."""
        for body in (b'{"challenge":"%b",%b}' % (UUID.encode(), META), b'{"x":{"challenge":"a"},%b}' % META):
            assert described(receive(inbound(body, TOKEN))) == "admitted"


# { printf '%s' "$STAMP."; cat body; } | openssl dgst -sha256 -hmac "$SECRET" -binary | base64, STAMP 1767225600.
