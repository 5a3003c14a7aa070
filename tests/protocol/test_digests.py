"""Digests without releasing the GIL are equal to those of hashlib and hmac."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from receiver.protocol.digests import hmac_sha256, sha256


@pytest.mark.parametrize("length", [0, 1, 2047, 2048, 2049, 4094, 4095, 32 * 1024 - 1, 32 * 1024, 100_000])
def test_sha256(length: int) -> None:
    """For any length, and any split."""
    data = bytes(index % 251 for index in range(length))
    expected = hashlib.sha256(data).digest()
    assert sha256(data) == expected
    assert sha256(memoryview(data)[: length // 3], memoryview(data)[length // 3 :]) == expected


@pytest.mark.parametrize("key", [b"", b"k", 64 * b"k", 65 * b"k"])
def test_hmac_sha256(key: bytes) -> None:
    """Also for several digests with the same key."""
    for data in (b"", b"one", 5_000 * b"two"):
        assert hmac_sha256(key, data) == hmac.digest(key, data, "sha256")
