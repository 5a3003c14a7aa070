"""Rules for every credential kind: the test class of a kind inherits `VerificationCases`.

Must not know how a kind works. The subclass has the headers as fixed text, made by another implementation than the code
under test.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.errors import Unverified
from receiver.protocol import verification
from receiver.protocol.message import Verified
from receiver.protocol.registry import Credential, Destination
from tests.protocol.made_up import BODY, NOW, Which, destination, head, inbound

Headers = Mapping[str, str]

_TICK = timedelta(microseconds=1)


def verify(headers: Headers, at: Destination, *, body: bytes = BODY, now: datetime = NOW) -> Verified:
    """Verify a request: its head, then its body."""
    request = inbound(body, headers)
    return verification.check_head(request.head, at, now).complete(request, at, now)


def refusal(headers: Headers, at: Destination, *, body: bytes = BODY, now: datetime = NOW) -> str:
    """Return the reason why a request is refused."""
    with pytest.raises(Unverified) as refused:
        verify(headers, at, body=body, now=now)
    assert refused.value.status_hint == 401
    assert refused.value.reason in verification.reason_meanings()
    return refused.value.reason


class VerificationCases:
    """The cases of one kind. A subclass defines its credentials, and the headers of a sender that has them."""

    kind: ClassVar[str]
    # The headers with BODY of a sender that has the first, or the second, of two secrets.
    right: ClassVar[Mapping[Which, Headers]]
    # Headers that a destination with the first secret refuses, with the reason: wrong, malformed, partial, duplicate.
    bad: ClassVar[Mapping[str, tuple[Headers, str]]]
    # The reasons for right headers whose credential is no longer live.
    expired: ClassVar[str]
    revoked: ClassVar[str]
    # The reason for right headers at a destination that requires the kind and has no credential of it.
    unknown: ClassVar[str]
    # Another kind, a credential of it, and its right headers.
    companion: ClassVar[tuple[str, Credential, Headers]]
    # Whether a destination that has a credential of the kind, but requires another kind, checks its headers.
    claims_unrequired: ClassVar[bool] = True
    # Whether the head is enough.
    by_head: ClassVar[bool] = True

    def credential(
        self,
        which: Which = "first",
        *,
        id: int = 1,  # noqa: A002
        expires_at: datetime | None = None,
        revoked: bool = False,
    ) -> Credential:
        """Return the credential with that secret (`id` is the field's name)."""
        raise NotImplementedError

    def presenting(self, value: str) -> Headers:
        """Return headers that present `value` in the form of this kind."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test that takes `bad_one` for each entry of `bad`."""
        if "bad_one" in metafunc.fixturenames:
            metafunc.parametrize("bad_one", self.bad.values(), ids=self.bad)

    def at(self, *credentials: Credential, require: tuple[str, ...] = ()) -> Destination:
        """Return a destination that requires this kind by default."""
        return destination(*credentials, require=require or (self.kind,))

    def test_right(self) -> None:
        """A sender with the secret is accepted, and the proof names credential and kind."""
        at = self.at(self.credential(id=7))
        assert verification.check_head(head(self.right["first"]), at, NOW).sufficient is True
        verified = verify(self.right["first"], at)
        assert verified.credentials == (7,)
        assert verified.kinds == {self.kind}

    def test_what_the_head_proves(self) -> None:
        """A head that is enough is accepted with any body. Otherwise another body is refused."""
        at, headers = self.at(self.credential()), self.right["first"]
        assert verification.check_head(head(headers), at, NOW).authenticated is self.by_head
        assert verification.check_head(head(), at, NOW).authenticated is False
        if self.by_head:
            assert verify(headers, at, body=b"another").kinds == {self.kind}
        else:
            refusal(headers, at, body=b"another")

    def test_missing(self) -> None:
        """A request without a credential is refused, and at most the body of a handshake is read."""
        at = self.at(self.credential())
        for headers in ({}, {"content-type": "application/json", "user-agent": "RedoxEngine", "cookie": "a=b"}):
            assert verification.check_head(head(headers), at, NOW).sufficient is False
            assert refusal(headers, at) == "credential_missing"

    def test_bad(self, bad_one: tuple[Headers, str]) -> None:
        """Wrong, malformed, partial and duplicate headers are refused."""
        headers, reason = bad_one
        assert refusal(headers, self.at(self.credential())) == reason

    def test_bad_with_another_kind_s_right_credential(self, bad_one: tuple[Headers, str]) -> None:
        """They are refused even if another kind, whose headers are right, would be enough."""
        headers, reason = bad_one
        other, credential, proof = self.companion
        for require in ((self.kind, other), (self.kind,), (f"{self.kind}+{other}", other)):
            at = self.at(self.credential(), credential, require=require)
            assert refusal({**headers, **proof}, at) == reason

    def test_bad_where_only_another_kind_is_required(self, bad_one: tuple[Headers, str]) -> None:
        """There a kind refuses its bad headers, or does not check them: then the other kind's proof is accepted."""
        headers, reason = bad_one
        other, credential, proof = self.companion
        at = self.at(self.credential(), credential, require=(other,))
        if self.claims_unrequired:
            assert refusal({**headers, **proof}, at) == reason
        else:
            assert verify({**headers, **proof}, at).kinds == {other}

    def test_only_its_own_secret(self) -> None:
        """A destination refuses another destination's secret."""
        reasons = {reason for _, reason in self.bad.values()}
        assert refusal(self.right["second"], self.at(self.credential("first"))) in reasons

    def test_expired(self) -> None:
        """A credential is accepted until the moment it expires, and never after."""
        at = self.at(self.credential(expires_at=NOW))
        verify(self.right["first"], at, now=NOW - _TICK)
        for now in (NOW, NOW + timedelta(seconds=60)):
            assert refusal(self.right["first"], at, now=now) == self.expired

    def test_revoked(self) -> None:
        """A revoked credential is refused, even before it expires."""
        at = self.at(self.credential(revoked=True, expires_at=NOW + timedelta(days=1)))
        assert refusal(self.right["first"], at) == self.revoked

    def test_rotated(self) -> None:
        """Two live credentials are accepted, and the proof names the right one; after the old one expired, only the
        new.
        """
        for pair in (
            (self.credential("first", id=1, expires_at=NOW), self.credential("second", id=2)),
            (self.credential("second", id=2), self.credential("first", id=1, expires_at=NOW)),
        ):
            at = self.at(*pair)
            assert verify(self.right["first"], at, now=NOW - _TICK).credentials == (1,)
            assert verify(self.right["second"], at, now=NOW - _TICK).credentials == (2,)
            assert verify(self.right["second"], at).credentials == (2,)
            assert refusal(self.right["first"], at) in {self.expired, *(reason for _, reason in self.bad.values())}

    def test_the_same_secret_twice(self) -> None:
        """A secret that was revoked and added again is accepted by its live credential, in any order."""
        for pair in (
            (self.credential(id=1, revoked=True), self.credential(id=2)),
            (self.credential(id=2), self.credential(id=1, revoked=True)),
        ):
            assert verify(self.right["first"], self.at(*pair)).credentials == (2,)

    def test_fails_closed(self) -> None:
        """A required kind without a live credential refuses every request, even with another kind's right headers."""
        other, credential, proof = self.companion
        for require in ((self.kind,), (f"{self.kind}+{other}",)):
            none = self.at(credential, require=require)
            assert refusal({**self.right["first"], **proof}, none) == self.unknown
            dead = self.at(self.credential(revoked=True), credential, require=require)
            assert refusal({**self.right["first"], **proof}, dead) == self.revoked
            # Without headers of this kind, those of the other are not sufficient.
            assert verification.check_head(head(proof), dead, NOW).sufficient is False
            assert refusal(proof, dead) == "credential_insufficient"

    def test_adding_one_never_widens(self) -> None:
        """A credential of a kind that the destination does not require accepts no request."""
        other, credential, _ = self.companion
        at = self.at(self.credential(), credential, require=(other,))
        assert verification.check_head(head(self.right["first"]), at, NOW).sufficient is False
        assert refusal(self.right["first"], at) == (
            "credential_insufficient" if self.claims_unrequired else "credential_missing"
        )

    def test_an_expired_credential_of_another_kind_refuses_nothing(self) -> None:
        """A revoked or expired credential of a kind that is not required claims nothing.

        Otherwise a credential with wrong settings would refuse the whole feed forever.
        """
        other, credential, proof = self.companion
        for ended in (self.credential(revoked=True), self.credential(expires_at=NOW)):
            at = self.at(ended, credential, require=(other,))
            assert verify({**self.right["first"], **proof}, at).kinds == {other}

    def test_both_required(self) -> None:
        """If two kinds are required together, both must be right, and the proof names both credentials."""
        other, credential, proof = self.companion
        at = self.at(self.credential(id=1), credential, require=(f"{other}+{self.kind}",))
        both = {**self.right["first"], **proof}
        assert verification.check_head(head(both), at, NOW).sufficient is True
        verified = verify(both, at)
        assert set(verified.credentials) == {1, credential.id}
        assert verified.kinds == {self.kind, other}
        for one in (self.right["first"], proof):
            assert verification.check_head(head(one), at, NOW).sufficient is False
            assert refusal(one, at) == "credential_insufficient"

    def test_either_suffices(self) -> None:
        """If either of two kinds is enough, each is accepted alone; presented together, both are verified."""
        other, credential, proof = self.companion
        at = self.at(self.credential(id=1), credential, require=(other, self.kind))
        assert verify(self.right["first"], at).credentials == (1,)
        assert verify(proof, at).credentials == (credential.id,)
        assert verify({**self.right["first"], **proof}, at).kinds == {self.kind, other}

    def test_an_empty_alternative_accepts_nothing(self) -> None:
        """An alternative without a kind is never satisfied."""
        _, credential, _ = self.companion
        at = Destination(
            id=1,
            name="main",
            environment="staging",
            enabled=True,
            require=(frozenset(),),
            credentials=(self.credential(), credential),
        )
        assert verification.check_head(head(), at, NOW).sufficient is False
        assert refusal({}, at) == "credential_missing"
        assert refusal(self.right["first"], at) == (
            "credential_insufficient" if self.claims_unrequired else "credential_missing"
        )

    def test_any_value(self) -> None:
        """Any text, in latin-1 as on the wire or not, is refused, and raises no other error."""
        at = self.at(self.credential(), self.credential("second", id=2))

        @given(st.text(st.characters(max_codepoint=255), max_size=80) | st.text(max_size=20))
        def refused(value: str) -> None:
            assert refusal(self.presenting(value), at)

        refused()

    def test_secrets_are_not_shown(self) -> None:
        """No repr and no error shows a secret, a digest or a presented value."""
        credential = self.credential()
        at = self.at(credential)
        shown = [
            repr(each)
            for each in (
                credential,
                at,
                head(self.right["first"]),
                inbound(BODY, self.right["first"]),
                verify(self.right["first"], at),
            )
        ]
        with pytest.raises(Unverified) as refused:
            verify(self.right["second"], at)
        shown += [repr(refused.value), str(refused.value)]
        secrets = [*self.right["first"].values(), *self.right["second"].values(), *self.secrets()]
        assert not [secret for secret in secrets for text in shown if secret in text]

    def secrets(self) -> list[str]:
        """Return the secrets that must not be shown, in every form."""
        raise NotImplementedError
