"""Credentials as rows: how secrets are stored, and the conversion of rows to credentials.

receiver.protocol.verification describes the kinds. Must not read or write rows (see receiver.storage.registry.loader,
receiver.storage.registry.changes), nor verify requests.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from hmac import compare_digest, digest
from typing import Any, Final

import msgspec

from receiver.errors import ConfigurationError
from receiver.keyring import Keyring
from receiver.protocol.jose import VerifyingKey
from receiver.protocol.registry import Credential
from receiver.protocol.verification import KINDS, oauth
from receiver.protocol.verification.kind import SecretStorage, StoredCredential
from receiver.storage.evidence.encryption import Sealer

# While keys are stale, the registry is checked for newer ones this often, in seconds.
_STALE_RELOAD: Final = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class KeySet:
    """Public keys as last fetched, `age` seconds ago."""

    keys: tuple[VerifyingKey, ...]
    age: float


# By URL.
KeySets = Mapping[str, KeySet]


def credential_binding(credential_id: int) -> str:
    """Return the binding to which a credential's secret is sealed."""
    return f"credential:{credential_id}"


def new_token() -> str:
    """Return a verification token: 256 random bits, in characters that Redox's dashboard accepts."""
    return secrets.token_urlsafe(32)


class CredentialFactory:
    """Makes credentials from rows, under one keyring.

    `reload_after`: seconds after which the first of the credentials changes, because its keys become stale.
    """

    def __init__(self, keyring: Keyring) -> None:
        self.reload_after = math.inf
        self._keyring = keyring
        self._seals = Sealer(keyring)
        # The first key signs. A pending key must not: other hosts may not have it yet, and could not verify its tokens.
        keys = sorted(
            (key for key in keyring.keys if key.purpose == "token"),
            key=lambda key: (not key.pending, key.created),
            reverse=True,
        )
        self._token_keys = tuple(
            VerifyingKey(kid=key.id, algorithms=frozenset({oauth.ALGORITHM}), key=key.derive("access token"))
            for key in keys
        )

    def credential(self, row: Mapping[str, Any], sets: KeySets, now: datetime) -> Credential:
        """Return the credential of a row. `now`: the database's time. Raises ConfigurationError or IntegrityError for a
        bad row.

        A credential to be revoked later (`credential revoke --grace`) is live until then.
        """
        revoked, ends = row["revoked_at"], row["expires_at"]
        if revoked is not None and revoked > now:
            ends, revoked = min(filter(None, (ends, revoked))), None
        return self._value(
            row["kind"],
            row["settings"],
            sets,
            id=row["id"],
            expires_at=ends,
            revoked=revoked is not None,
            secret=self.open_secret(row),
            digest=row["digest"] or b"",
        )

    def resolve(self, kind: str, settings: Mapping[str, Any], secret: bytes | None) -> dict[str, Any]:
        """Return the settings to store. Raises ConfigurationError naming the invalid one."""
        described = KINDS[kind]
        described.check_secret(secret)
        try:
            read = msgspec.convert(dict(settings), described.settings)
        except msgspec.ValidationError as exc:
            raise ConfigurationError(f"kind {kind}: {exc}; see `credential add --help`") from None
        normal: dict[str, Any] = msgspec.to_builtins(described.normalize(read))
        # Keys of a URL are fetched later: none are given here.
        self._value(kind, normal, {}, id=0, secret=secret or b"")
        return normal

    def same(self, row: Mapping[str, Any], kind: str, settings: Mapping[str, Any], secret: bytes | None) -> bool:
        """Return whether a row is a credential of that kind, secret and settings (as `resolve` returns them)."""
        if row["kind"] != kind or dict(row["settings"]) != settings:
            return False
        if KINDS[kind].secret is SecretStorage.DIGESTED:
            return compare_digest(self.digest(kind, secret or b""), row["digest"])
        return compare_digest(self.open_secret(row), secret or b"")

    def open_secret(self, row: Mapping[str, Any]) -> bytes:
        """Return the decrypted secret of a row; empty if it has none, or only a digest. Raises IntegrityError."""
        if row["secret"] is None:
            return b""
        return self._seals.open(row["secret_key"], row["secret"], credential_binding(row["id"]))

    def digest(self, kind: str, secret: bytes) -> bytes:
        """Return the stored digest of a secret that is only compared."""
        return digest(self._digest_key(kind), secret, "sha256")

    def secret_columns(self, kind: str, secret: bytes | None, credential_id: int) -> dict[str, Any]:
        """Return the columns of a secret. A sealed one is bound to its row."""
        if secret is None:
            return {}
        if KINDS[kind].secret is SecretStorage.DIGESTED:
            return {"digest": self.digest(kind, secret), "secret_key": self._keyring.current("index").id}
        key_id, sealed = self._seals.seal("secret", secret, credential_binding(credential_id))
        return {"secret": sealed, "secret_key": key_id}

    def _digest_key(self, kind: str) -> bytes:
        """Return the key of a kind's digests. The index key is never retired: digests must stay comparable."""
        return self._keyring.current("index").derive(KINDS[kind].digest_label)

    def _value(self, kind: str, settings: Mapping[str, Any], sets: KeySets, **stored: Any) -> Credential:
        def key_set(url: str, max_stale: int) -> tuple[tuple[VerifyingKey, ...], bool]:
            found = sets.get(url)
            if found is None:
                return (), False
            left = max_stale - found.age
            self.reload_after = min(self.reload_after, left if left > 0 else _STALE_RELOAD)
            return found.keys, left <= 0

        try:
            described = KINDS[kind]
            key = self._digest_key(kind) if described.secret is SecretStorage.DIGESTED else b""
            credential: Credential = described.make(
                msgspec.convert(dict(settings), described.settings),
                StoredCredential(digest_key=key, token_keys=self._token_keys, key_set=key_set, **stored),
            )
        except (KeyError, msgspec.ValidationError) as exc:
            raise ConfigurationError(f"this version cannot read a credential of kind {kind}") from exc
        return credential
