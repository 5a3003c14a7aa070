"""Signing keys for client assertions: created here, stored sealed, rotated, retired.

Must not return a private key except from `active`, whose caller signs with it. The public halves of all keys that are
not retired are loaded with the registry, and served.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from sqlalchemy import Connection, Row, select

from receiver.errors import ConfigurationError, Conflict, IntegrityError, NotFound
from receiver.keyring import Keyring
from receiver.protocol.api_keys import PrivateKey
from receiver.protocol.jwk import public_jwk
from receiver.storage import schema
from receiver.storage.evidence.encryption import Sealer
from receiver.storage.registry.loader import mac_verifies
from receiver.storage.registry.transactions import RegistryTransactions

Algorithm = Literal["RS384", "ES384"]

# Redox accepts 2048 and more; NIST SP 800-57 part 1 requires 3072 if a signature must hold beyond 2030.
RSA_BITS: Final = 3072

_table: Final = schema.signing_keys


class SigningKeys(RegistryTransactions):
    """Operations on signing keys, each audited. A key is published first, then active, then published until it is
    retired.
    """

    def new(self, now: datetime, algorithm: Algorithm) -> dict[str, Any]:
        """Create a key: active if there is no active one, else published until `rotate`. Returns its row."""
        with self._change() as connection:
            kid = self._make(connection, now, algorithm, active=self._active(connection) is None)
        return self.row(kid)

    def rotate(self, now: datetime, algorithm: Algorithm | None) -> dict[str, Any]:
        """Activate the newest key that has not signed yet, else a new one, of the same algorithm unless given.

        The previous key stays published. Returns the row of the active one.
        """
        with self._change() as connection:
            before = self._active(connection)
            waiting = (
                None
                if algorithm is not None
                else connection.execute(
                    select(_table)
                    .where(_table.c.state == "published", _table.c.activated_at.is_(None))
                    .order_by(_table.c.id.desc())
                    .limit(1)
                ).one_or_none()
            )
            if before is not None:
                self._update(connection, _table, before, {"state": "published"})
            if waiting is None:
                made: Any = algorithm or ("RS384" if before is None else before.algorithm)
                kid = self._make(connection, now, made, active=True)
            else:
                kid = waiting.kid
                self._update(connection, _table, waiting, {"state": "active", "activated_at": now})
            self._add_event(
                connection,
                now,
                "signing_key.rotate",
                None,
                f"signing_keys:{kid}",
                {"kid": kid, "before": None if before is None else before.kid},
            )
        return self.row(kid)

    def retire(self, kid: str, now: datetime) -> dict[str, Any]:
        """Stop publishing a key, and delete its private half. Returns its row.

        Raises NotFound; Conflict when it is active, or retired already.
        """
        with self._change() as connection:
            row = connection.execute(select(_table).where(_table.c.kid == kid)).one_or_none()
            if row is None:
                raise NotFound(f"there is no signing key {kid}: see `signing-key list`")
            if row.state == "active":
                raise Conflict(f"{kid} signs: run `signing-key rotate` first, and retire it when Redox has the other")
            if row.state == "retired":
                raise Conflict(f"{kid} is retired already")
            self._update(
                connection, _table, row, {"state": "retired", "retired_at": now, "secret": None, "secret_key": None}
            )
            self._add_event(connection, now, "signing_key.retire", None, f"signing_keys:{kid}", {"kid": kid})
        return self.row(kid)

    def row(self, kid: str) -> dict[str, Any]:
        """Return the public columns of a key."""
        with self._engine.connect() as connection:
            return next(each for each in rows(connection) if each["kid"] == kid)

    def _active(self, connection: Connection) -> Row[Any] | None:
        return connection.execute(select(_table).where(_table.c.state == "active")).one_or_none()

    def _make(self, connection: Connection, now: datetime, algorithm: Algorithm, *, active: bool) -> str:
        key: PrivateKey = (
            rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
            if algorithm == "RS384"
            else ec.generate_private_key(ec.SECP384R1())
        )
        public = public_jwk(key)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        key_id, sealed = self._seals.seal("secret", pem, _binding(public["kid"]))
        self._insert(
            connection,
            _table,
            {
                "kid": public["kid"],
                "algorithm": algorithm,
                "public_jwk": public,
                "state": "active" if active else "published",
                "secret": sealed,
                "secret_key": key_id,
                "activated_at": now if active else None,
            },
        )
        self._add_event(
            connection,
            now,
            "signing_key.new",
            None,
            f"signing_keys:{public['kid']}",
            {"kid": public["kid"], "algorithm": algorithm, "active": active},
        )
        return public["kid"]


def rows(connection: Connection) -> list[dict[str, Any]]:
    """Return all keys, newest first, without their private halves."""
    shown = [each for each in _table.c if each.name not in ("mac", "mac_key", "secret", "secret_key")]
    return [dict(row) for row in connection.execute(select(*shown).order_by(_table.c.id.desc())).mappings()]


def active(connection: Connection, keyring: Keyring) -> tuple[str, bytes]:
    """Return (kid, private key as PEM) of the active key. Raises ConfigurationError (no active key), IntegrityError."""
    row = connection.execute(select(_table).where(_table.c.state == "active")).one_or_none()
    if row is None:
        raise ConfigurationError("no signing key is there to sign with: run `redox-receiver signing-key new`")
    if not mac_verifies(_table, row._asdict(), keyring):
        raise IntegrityError(
            f"signing key {row.kid} was changed by something else: run `redox-receiver audit verify`, "
            "and restore the row from a backup"
        )
    return row.kid, Sealer(keyring).open(row.secret_key, row.secret, _binding(row.kid))


def _binding(kid: str) -> str:
    return f"signing_key:{kid}"
