"""Seals: what is sealed opens as it was, where it was, and nowhere else."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import zstandard
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from receiver.errors import ConfigurationError, IntegrityError
from receiver.keyring import Keyring, create
from receiver.storage.evidence.encryption import Sealer, payload_binding

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEYRING = create(NOW)


@given(st.binary(max_size=5_000))
def test_a_body_opens_to_the_same_bytes(body: bytes) -> None:
    """Whatever they are."""
    seals = Sealer(KEYRING)
    key_id, sealed = seals.seal_body(body, "here")
    assert seals.open_body(key_id, sealed, "here") == body


def test_a_large_body_opens_to_the_same_bytes() -> None:
    """As large as the largest that is taken."""
    body = b"ab" * (20 << 20)
    seals = Sealer(KEYRING)
    key_id, sealed = seals.seal_body(body, "here")
    assert len(sealed) < len(body) // 100
    assert seals.open_body(key_id, sealed, "here") == body


def test_the_form_is_nonce_ciphertext_and_tag() -> None:
    """Opened here with the library alone: AES-256-GCM under the derived key, the place as associated data."""
    key_id, sealed = Sealer(KEYRING).seal_body(b"body" * 100, payload_binding("uuid"))
    cipher = AESGCM(KEYRING[key_id].derive("seal"))
    assert zstandard.decompress(cipher.decrypt(sealed[:12], sealed[12:], b"payload:uuid")) == b"body" * 100


def test_no_two_seals_are_alike() -> None:
    """A nonce for each: equal bodies do not show."""
    seals = Sealer(KEYRING)
    assert len({seals.seal("secret", b"same", "here")[1][:12] for _ in range(100)}) == 100


@pytest.mark.parametrize("place", ["there", "", "her", "here "])
def test_what_was_moved_does_not_open(place: str) -> None:
    """It is bound to where it stands."""
    key_id, sealed = Sealer(KEYRING).seal("secret", b"plain", "here")
    with pytest.raises(IntegrityError, match=f"{key_id} cannot be opened"):
        Sealer(KEYRING).open(key_id, sealed, place)


@given(st.integers(0, 34), st.integers(1, 255))
def test_what_was_changed_does_not_open(place: int, change: int) -> None:
    """Any bit of it, and nothing of it is told."""
    key_id, sealed = Sealer(KEYRING).seal("secret", b"canary!", "here")
    changed = bytearray(sealed)
    changed[place % len(sealed)] ^= change
    with pytest.raises(IntegrityError) as caught:
        Sealer(KEYRING).open(key_id, bytes(changed), "here")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 11, 12, 27, 28])
def test_what_was_cut_short_does_not_open(length: int) -> None:
    """An empty column, half a nonce, no tag."""
    key_id, sealed = Sealer(KEYRING).seal("secret", b"plain", "here")
    with pytest.raises(IntegrityError):
        Sealer(KEYRING).open(key_id, sealed[:length], "here")


def test_another_key_does_not_open_it() -> None:
    """Neither one of another purpose, nor one that is not there, nor another host's."""
    _, sealed = Sealer(KEYRING).seal("secret", b"plain", "here")
    with pytest.raises(IntegrityError):
        Sealer(KEYRING).open(KEYRING.current("payload").id, sealed, "here")
    with pytest.raises(IntegrityError, match="holds no key secret-0"):
        Sealer(KEYRING).open("secret-0", sealed, "here")


def test_what_an_old_key_sealed_opens_when_there_is_a_new_one() -> None:
    """The new one seals from then on."""
    old_id, sealed = Sealer(KEYRING).seal_body(b"body", "here")
    seals = Sealer(KEYRING.with_new("payload", NOW + timedelta(days=1)))
    assert seals.open_body(old_id, sealed, "here") == b"body"
    assert seals.seal_body(b"body", "here")[0] != old_id


def test_without_a_key_nothing_is_sealed() -> None:
    """There is no way to write in the clear."""
    with pytest.raises(ConfigurationError, match="keys new payload"):
        Sealer(Keyring(())).seal_body(b"body", "here")
