"""MACs over rows, the link of audit chains, and keyed digests.

Must not read or write rows. The encoding below is part of the stored evidence: it must never change for existing rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hmac import compare_digest
from operator import itemgetter
from typing import Any, Final
from uuid import UUID

import msgspec

from receiver.keyring import Key, Keyring
from receiver.protocol.digests import hmac_sha256, sha256

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

# The immutable columns of each table that its MAC covers, in this order. Columns that change later (last_used_at,
# paused_at, state) are not among them.
COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "destinations": (
        "id",
        "name",
        "environment",
        "enabled",
        "require",
        "sources_policy",
        "on_unknown_source",
        "test_messages",
        "reply_with",
    ),
    "credentials": (
        "id",
        "destination_id",
        "kind",
        "label",
        "digest",
        "secret",
        "secret_key",
        "settings",
        "expires_at",
        "revoked_at",
    ),
    "key_sets": ("id", "url", "document"),
    "sources": ("id", "destination_id", "source_id", "name", "enabled"),
    "subscriptions": (
        "id",
        "destination_id",
        "handler",
        "role",
        "patterns",
        "ordering",
        "patient_key",
        "acknowledge",
        "on_failure",
        "max_attempts",
        "timeout",
        "enabled",
    ),
    "signing_keys": ("id", "kid", "algorithm", "public_jwk", "state", "secret", "secret_key"),
    "api_keys": (
        "id",
        "name",
        "environment",
        "kind",
        "base_url",
        "source_id",
        "client_id",
        "kid",
        "scope",
        "query_path",
        "secret",
        "secret_key",
    ),
    "messages": (
        "uuid",
        "destination_id",
        "credential_ids",
        "source_id",
        "kind",
        "query",
        "test",
        "log_id",
        "attempt_id",
        "message_id",
        "transmission_id",
        "facility",
        "event_time",
        "received_at",
        "peer",
        "digest",
        "size",
        "content_type",
    ),
    "audit_events": (
        "writer",
        "n",
        "at",
        "action",
        "outcome",
        "reason",
        "actor",
        "peer",
        "destination",
        "message_uuid",
        "subject",
        "count",
        "detail",
        "note",
        "note_key",
    ),
}


_values: Final = {table: itemgetter(*columns) for table, columns in COLUMNS.items()}


def mac_key(key: Key) -> bytes:
    """Return the key that signs rows."""
    return key.derive("row mac")


def row_mac(key: bytes, table: str, row: Mapping[str, Any], *, previous: bytes = b"") -> bytes:
    """Return the HMAC-SHA256 over the table's name, the columns of COLUMNS and, in a chain, the previous MAC."""
    return hmac_sha256(key, previous + encode(str(table), *_values[table](row)))


class SigningKey:
    """The current MAC key of a keyring, derived once for each key. A newly activated key signs the next row."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._derived: tuple[str, bytes] = ("", b"")

    def current(self) -> tuple[str, bytes]:
        """Return (key id, key). Raises ConfigurationError when the keyring holds no active MAC key."""
        key = self._keyring.current("mac")
        if key.id != self._derived[0]:
            self._derived = key.id, mac_key(key)
        return self._derived


class RowMacs:
    """Checks the MACs of rows under the keys of one keyring. Derives each key once. Thread-safe."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._keys: dict[str, bytes] = {}

    def hold(self, table: str, row: Mapping[str, Any], *, previous: bytes = b"") -> bool:
        """Return whether the row's MAC verifies. Raises UnknownKey when the keyring lacks its key."""
        key_id = row["mac_key"]
        key = self._keys.get(key_id)
        if key is None:
            key = self._keys[key_id] = mac_key(self._keyring[key_id])
        return compare_digest(row_mac(key, table, row, previous=previous), row["mac"])


def encode(*values: Any) -> bytes:
    """Return an unambiguous encoding: a JSON array; times in microseconds since 1970, bytes as base64, keys sorted."""
    return _encode([value if type(value) in _PLAIN else _plain(value) for value in values])


_encode: Final = msgspec.json.Encoder(order="sorted").encode
# Types that JSON holds unchanged; most values of a row are of these.
_PLAIN: Final = frozenset({str, int, bool, type(None), bytes, UUID, dict, list, tuple})


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return (value - _EPOCH) // _MICROSECOND
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    return value


class KeyedDigests:
    """HMAC-SHA256 digests of content under the index key, to find and compare what is stored without its text.

    A bare digest of a small message gives a patient's number away: a reader of the table can try all numbers.

    Thread-safe.
    """

    def __init__(self, keyring: Keyring) -> None:
        key = keyring.current("index")
        self._patient, self._content, self._source = (key.derive(use) for use in ("patient", "content", "source"))
        self._message_key, self._outside = key.derive("message key"), key.derive("outside")

    def patient(self, authority: str | None, id_type: str, identifier: str) -> bytes:
        """Return the digest of a patient's identifier.

        `authority`: who assigned it (FHIR's `identifier.system`), or else the id of the source. Two hospitals may give
        one number to two patients.
        """
        return hmac_sha256(self._patient, encode(authority, id_type, identifier))

    def content(self, body: bytes) -> bytes:
        """Return the digest of a whole body."""
        return self.content_of(sha256(body))

    def content_of(self, body_sha256: bytes) -> bytes:
        """Return the digest of the body with this SHA-256."""
        return hmac_sha256(self._content, body_sha256)

    def message_key(self, key: bytes) -> bytes:
        """Return `ParsedMessage.key` as it is stored."""
        return hmac_sha256(self._message_key, key)

    def outside(self, outside: bytes) -> bytes:
        """Return `ParsedMessage.outside` as it is stored."""
        return hmac_sha256(self._outside, outside)

    def source(self, claimed: str) -> bytes:
        """Return the digest of a source's id that is not shaped like one, and so may be anything."""
        return hmac_sha256(self._source, claimed.encode())


def chain(key: bytes, rows: Sequence[dict[str, Any]], previous: bytes) -> bytes:
    """Set the `mac` of each audit row, each over the previous one. Returns the last."""
    for row in rows:
        previous = row["mac"] = row_mac(key, "audit_events", row, previous=previous)
    return previous
