"""What every kind of verification must stand, once for all of them: a kind's test class inherits `VerificationCases`.

May not know how a kind works. What it presents is fixed text of the class that inherits, made by other means than the
code under test.
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
    """Verified by its head and then with its body, as a request is."""
    request = inbound(body, headers)
    return verification.check_head(request.head, at, now).complete(request, at, now)


def refusal(headers: Headers, at: Destination, *, body: bytes = BODY, now: datetime = NOW) -> str:
    """The reason why it does not verify."""
    with pytest.raises(Unverified) as refused:
        verify(headers, at, body=body, now=now)
    assert refused.value.status_hint == 401
    assert refused.value.reason in verification.reason_meanings()
    return refused.value.reason


class VerificationCases:
    """One kind. A subclass says what its credentials are and what a sender presents who has them."""

    kind: ClassVar[str]
    # What a sender presents with BODY who holds the first, or the second, of two secrets.
    right: ClassVar[Mapping[Which, Headers]]
    # What must not open a door to which the first secret is the key, with the reason: wrong, malformed, in part, twice.
    bad: ClassVar[Mapping[str, tuple[Headers, str]]]
    # The reasons for what was right, but whose credential is not live any more.
    expired: ClassVar[str]
    revoked: ClassVar[str]
    # The reason for what is right elsewhere, where this kind is required and has no credential at all.
    unknown: ClassVar[str]
    # Another kind, a credential of it, and what proves that one.
    companion: ClassVar[tuple[str, Credential, Headers]]
    # Whether it judges what is presented in its name at a destination that has its credential and requires others.
    claims_unrequired: ClassVar[bool] = True
    # Whether the head is the whole proof.
    by_head: ClassVar[bool] = True

    def credential(
        self,
        which: Which = "first",
        *,
        id: int = 1,  # noqa: A002
        expires_at: datetime | None = None,
        revoked: bool = False,
    ) -> Credential:
        """The row of that secret (`id` is the field's name)."""
        raise NotImplementedError

    def presenting(self, value: str) -> Headers:
        """Headers that present `value` in this kind's name."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """A test that takes `bad_one` runs for each of `bad`."""
        if "bad_one" in metafunc.fixturenames:
            metafunc.parametrize("bad_one", self.bad.values(), ids=self.bad)

    def door(self, *credentials: Credential, require: tuple[str, ...] = ()) -> Destination:
        """A destination that requires this kind, unless told otherwise."""
        return destination(*credentials, require=require or (self.kind,))

    def test_right(self) -> None:
        """Who has the secret is let in, and the proof names credential and kind."""
        at = self.door(self.credential(id=7))
        assert verification.check_head(head(self.right["first"]), at, NOW).sufficient is True
        verified = verify(self.right["first"], at)
        assert verified.credentials == (7,)
        assert verified.kinds == {self.kind}

    def test_what_the_head_proves(self) -> None:
        """A head that is proof enough is so beside any body; where it isn't, another body is refused."""
        at, headers = self.door(self.credential()), self.right["first"]
        assert verification.check_head(head(headers), at, NOW).authenticated is self.by_head
        assert verification.check_head(head(), at, NOW).authenticated is False
        if self.by_head:
            assert verify(headers, at, body=b"another").kinds == {self.kind}
        else:
            refusal(headers, at, body=b"another")

    def test_missing(self) -> None:
        """Who presents nothing is refused; of the body no more than a handshake's may be read."""
        at = self.door(self.credential())
        for headers in ({}, {"content-type": "application/json", "user-agent": "RedoxEngine", "cookie": "a=b"}):
            assert verification.check_head(head(headers), at, NOW).sufficient is False
            assert refusal(headers, at) == "credential_missing"

    def test_bad(self, bad_one: tuple[Headers, str]) -> None:
        """Nothing that is wrong, malformed, in part or twice opens the door."""
        headers, reason = bad_one
        assert refusal(headers, self.door(self.credential())) == reason

    def test_bad_beside_another_kind_s_right(self, bad_one: tuple[Headers, str]) -> None:
        """Nor does it where another kind would have sufficed and is right: what is claimed and bad refuses."""
        headers, reason = bad_one
        other, credential, proof = self.companion
        for require in ((self.kind, other), (self.kind,), (f"{self.kind}+{other}", other)):
            at = self.door(self.credential(), credential, require=require)
            assert refusal({**headers, **proof}, at) == reason

    def test_bad_where_only_another_kind_is_required(self, bad_one: tuple[Headers, str]) -> None:
        """There a kind refuses what is bad of it, or does not look at it: then the other kind's proof lets in."""
        headers, reason = bad_one
        other, credential, proof = self.companion
        at = self.door(self.credential(), credential, require=(other,))
        if self.claims_unrequired:
            assert refusal({**headers, **proof}, at) == reason
        else:
            assert verify({**headers, **proof}, at).kinds == {other}

    def test_only_its_own_secret(self) -> None:
        """Another destination's secret does not open this one's door."""
        reasons = {reason for _, reason in self.bad.values()}
        assert refusal(self.right["second"], self.door(self.credential("first"))) in reasons

    def test_expired(self) -> None:
        """A credential opens until the moment it expires, and never after."""
        at = self.door(self.credential(expires_at=NOW))
        verify(self.right["first"], at, now=NOW - _TICK)
        for now in (NOW, NOW + timedelta(seconds=60)):
            assert refusal(self.right["first"], at, now=now) == self.expired

    def test_revoked(self) -> None:
        """A revoked credential opens nothing, however long it would have lasted."""
        at = self.door(self.credential(revoked=True, expires_at=NOW + timedelta(days=1)))
        assert refusal(self.right["first"], at) == self.revoked

    def test_rotated(self) -> None:
        """While two are live both open, and the proof says which did; when the old has ended only the new one does."""
        for pair in (
            (self.credential("first", id=1, expires_at=NOW), self.credential("second", id=2)),
            (self.credential("second", id=2), self.credential("first", id=1, expires_at=NOW)),
        ):
            at = self.door(*pair)
            assert verify(self.right["first"], at, now=NOW - _TICK).credentials == (1,)
            assert verify(self.right["second"], at, now=NOW - _TICK).credentials == (2,)
            assert verify(self.right["second"], at).credentials == (2,)
            assert refusal(self.right["first"], at) in {self.expired, *(reason for _, reason in self.bad.values())}

    def test_the_same_secret_twice(self) -> None:
        """A secret that was revoked and entered again opens by the live row, in whichever order they stand."""
        for pair in (
            (self.credential(id=1, revoked=True), self.credential(id=2)),
            (self.credential(id=2), self.credential(id=1, revoked=True)),
        ):
            assert verify(self.right["first"], self.door(*pair)).credentials == (2,)

    def test_fails_closed(self) -> None:
        """Where it is required, no live credential means that nobody is let in, also beside another kind's right."""
        other, credential, proof = self.companion
        for require in ((self.kind,), (f"{self.kind}+{other}",)):
            none = self.door(credential, require=require)
            assert refusal({**self.right["first"], **proof}, none) == self.unknown
            dead = self.door(self.credential(revoked=True), credential, require=require)
            assert refusal({**self.right["first"], **proof}, dead) == self.revoked
            # Without anything of this kind the other alone does not suffice.
            assert verification.check_head(head(proof), dead, NOW).sufficient is False
            assert refusal(proof, dead) == "credential_insufficient"

    def test_adding_one_never_widens(self) -> None:
        """A credential of this kind at a destination that does not require it lets nobody in."""
        other, credential, _ = self.companion
        at = self.door(self.credential(), credential, require=(other,))
        assert verification.check_head(head(self.right["first"]), at, NOW).sufficient is False
        assert refusal(self.right["first"], at) == (
            "credential_insufficient" if self.claims_unrequired else "credential_missing"
        )

    def test_one_that_has_ended_refuses_nothing(self) -> None:
        """Where nothing requires this kind, a credential that is revoked or has expired claims nothing any more.

        Otherwise a credential that was set wrongly would refuse the whole feed for ever.
        """
        other, credential, proof = self.companion
        for ended in (self.credential(revoked=True), self.credential(expires_at=NOW)):
            at = self.door(ended, credential, require=(other,))
            assert verify({**self.right["first"], **proof}, at).kinds == {other}

    def test_both_required(self) -> None:
        """Where two kinds are required together, both must be right; the proof names both credentials."""
        other, credential, proof = self.companion
        at = self.door(self.credential(id=1), credential, require=(f"{other}+{self.kind}",))
        both = {**self.right["first"], **proof}
        assert verification.check_head(head(both), at, NOW).sufficient is True
        verified = verify(both, at)
        assert set(verified.credentials) == {1, credential.id}
        assert verified.kinds == {self.kind, other}
        for one in (self.right["first"], proof):
            assert verification.check_head(head(one), at, NOW).sufficient is False
            assert refusal(one, at) == "credential_insufficient"

    def test_either_suffices(self) -> None:
        """Where either of two kinds suffices, each does alone; presented together, both are proved."""
        other, credential, proof = self.companion
        at = self.door(self.credential(id=1), credential, require=(other, self.kind))
        assert verify(self.right["first"], at).credentials == (1,)
        assert verify(proof, at).credentials == (credential.id,)
        assert verify({**self.right["first"], **proof}, at).kinds == {self.kind, other}

    def test_an_alternative_of_nothing_is_no_door(self) -> None:
        """A set of no kinds, should one ever come to be, is not satisfied by nothing."""
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
        """Whatever text is presented, in latin-1 as on the wire or not: it is refused, and nothing else is raised."""
        at = self.door(self.credential(), self.credential("second", id=2))

        @given(st.text(st.characters(max_codepoint=255), max_size=80) | st.text(max_size=20))
        def refused(value: str) -> None:
            assert refusal(self.presenting(value), at)

        refused()

    def test_secrets_are_not_shown(self) -> None:
        """No repr of what takes part shows a secret, a digest or what was presented, nor does what is raised."""
        credential = self.credential()
        at = self.door(credential)
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
        """What must not be shown, in every form in which it could be."""
        raise NotImplementedError
