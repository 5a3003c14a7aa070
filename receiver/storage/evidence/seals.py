"""Seals: the audit's rows as leaves of one Merkle tree, and its size and root signed every few seconds.

A leaf is the hash of an audit row's MAC, so a proof shows nothing of a row. One seal is made at a time, on any host.
Within a seal the leaves are in the order of (writer, n). A seal's body also says which rows it added, the digest of the
registry and the database's identity; the signed checkpoint holds the body's digest, and the body that of the checkpoint
before.

Must not verify (see receiver.storage.evidence.verify_seals).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from itertools import groupby
from operator import attrgetter
from typing import Any, Final
from uuid import UUID

import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection, Engine, Row

from receiver.keyring import Key, Keyring
from receiver.storage.evidence.commit_horizon import CommitHorizon
from receiver.storage.evidence.tiles import TileStore
from receiver.storage.identifiers import uuid7
from receiver.transparency import checkpoint as checkpoints
from receiver.transparency.checkpoint import Checkpoint, VerifierKey, verifier_key
from receiver.transparency.merkle import leaf_hash

log: Final = structlog.get_logger(__name__)

# Leaves of one seal. What is left is sealed next.
MOST: Final = 20_000
_LOCK: Final = 0x617564697473656C  # "auditsel" as a number

_LAST: Final = "SELECT n, size, body, checkpoint FROM audit_seals ORDER BY n DESC LIMIT 1"
_UNSEALED: Final = f"""
SELECT id, writer, n, mac FROM audit_events e
WHERE id > %(decided)s
  AND NOT EXISTS (SELECT FROM audit_seal_writers s WHERE s.writer = e.writer AND e.n BETWEEN s.first_n AND s.last_n)
ORDER BY id LIMIT {MOST}"""
_REGISTRY_TABLES: Final = ("api_keys", "credentials", "destinations", "signing_keys", "sources", "subscriptions")
_REGISTRY: Final = (
    "SELECT v.version, r.name, r.id, r.mac FROM registry_version v LEFT JOIN ("
    + " UNION ALL ".join(f"SELECT '{name}' AS name, id, mac FROM {name}" for name in _REGISTRY_TABLES)
    + ") r ON true ORDER BY r.name, r.id"
)
_IDENTITY: Final = "SELECT system_identifier::text FROM pg_catalog.pg_control_system()"
_PUT: Final = """
INSERT INTO audit_seals (n, at, size, root, body, checkpoint, seal_key)
VALUES (%(n)s, %(at)s, %(size)s, %(root)s, %(body)s, %(checkpoint)s, %(seal_key)s)"""
_PUT_WRITERS: Final = """
INSERT INTO audit_seal_writers (writer, first_n, last_n, first_leaf, seal)
SELECT writer, first_n, last_n, first_leaf, %(seal)s
FROM unnest(%(writers)s::uuid[], %(firsts)s::bigint[], %(lasts)s::bigint[], %(leaves)s::bigint[])
     AS u(writer, first_n, last_n, first_leaf)"""
_COVERED: Final = """
SELECT EXISTS (SELECT FROM audit_seal_writers WHERE writer = %(writer)s AND %(n)s BETWEEN first_n AND last_n)"""


class SealedRows(msgspec.Struct, frozen=True, array_like=True):
    """Rows of one writer that a seal added, without a gap. `mac`: of the last, in hexadecimal: the writer's head."""

    writer: UUID
    first_n: int
    last_n: int
    first_leaf: int
    mac: str


class RegistryDigest(msgspec.Struct, frozen=True):
    """The registry's version, and a SHA-256 over (table, id, MAC) of all its rows in hexadecimal."""

    version: int
    digest: str


class SealBody(msgspec.Struct, frozen=True, kw_only=True):
    """What a seal says in addition to size and root. Its JSON is what the checkpoint holds the digest of.

    `log`: the identity of the log, given with its first seal. `system`: the identity of PostgreSQL's data directory,
    which a restored copy does not share. `previous`: SHA-256 of the checkpoint before, in hexadecimal, or "".
    `decided`: all audit rows with ids up to this one are sealed, or will never exist.
    """

    n: int
    at: datetime
    log: UUID
    system: str
    previous: str
    decided: int
    registry: RegistryDigest
    rows: tuple[SealedRows, ...]

    def encode(self) -> str:
        return msgspec.json.encode(self, order="sorted").decode()

    @classmethod
    def decode(cls, text: str) -> SealBody:
        """Raises msgspec.MsgspecError."""
        return msgspec.json.decode(text, type=cls)

    @property
    def origin(self) -> str:
        """Return the name of the log in its checkpoints, and of the key that signs them."""
        return origin(self.log)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seal:
    """A seal that was made."""

    n: int
    size: int
    added: int
    checkpoint: str


def origin(log_id: UUID) -> str:
    """Return the name of the log with that identity."""
    return f"redox-receiver/{log_id}"


def private_key(key: Key) -> Ed25519PrivateKey:
    """Return the key that signs checkpoints. It is derived, so the keyring holds one sort of key."""
    return Ed25519PrivateKey.from_private_bytes(key.derive("checkpoint"))


def public_key(key: Key, log_id: UUID) -> VerifierKey:
    """Return the public half, under the log's name."""
    return verifier_key(origin(log_id), private_key(key))


def extension(n: int, body: str) -> str:
    """Return the line of a checkpoint that commits it to the seal's body."""
    return f"seal {n} {base64.b64encode(sha256(body.encode()).digest()).decode()}"


def checkpoint_digest(note: str) -> str:
    """Return what the next seal's body says of this checkpoint."""
    return sha256(note.encode()).hexdigest()


def registry_digest(connection: Connection) -> RegistryDigest:
    """Return the digest of the registry as it is now."""
    digest, version = sha256(), 0
    for row in connection.exec_driver_sql(_REGISTRY):
        version = row.version
        if row.name is not None:
            digest.update(f"{row.name}:{row.id}:".encode() + bytes(row.mac))
    return RegistryDigest(version=version, digest=digest.hexdigest())


class AuditSealer:
    """Seals what has committed. Not thread-safe."""

    def __init__(self, engine: Engine, keyring: Keyring) -> None:
        self._engine = engine
        self._keyring = keyring
        self._decided = 0
        self._horizon = CommitHorizon("audit_events")

    def seal(self, *, wait: bool = False) -> Seal | None:
        """Seal what has committed and is not sealed. Returns None when there is nothing, or another host does it now.

        `wait`: for the other host, and then see what is left. Raises ConfigurationError without a key for `seal`.
        """
        key = self._keyring.current("seal")
        with self._engine.begin() as connection:
            if not _locked(connection, wait=wait):
                return None
            last = connection.exec_driver_sql(_LAST).one_or_none()
            before = None if last is None else SealBody.decode(last.body)
            self._decided = max(self._decided, 0 if before is None else before.decided)
            decided = self._horizon.advance(connection, self._decided)
            rows = connection.exec_driver_sql(_UNSEALED, {"decided": self._decided}).all()
            if len(rows) < MOST:
                self._decided = decided
            if not rows:
                return None
            made = self._append(connection, key, last, before, rows)
        log.info("audit.sealed", id=made.n, count=made.added, checkpoint=made.checkpoint)
        return made

    def seal_row(self, writer: UUID, n: int) -> None:
        """Return when that committed row is sealed."""
        while True:
            self.seal(wait=True)
            with self._engine.connect() as connection:
                if connection.exec_driver_sql(_COVERED, {"writer": writer, "n": n}).scalar():
                    return

    def _append(
        self, connection: Connection, key: Key, last: Row[Any] | None, before: SealBody | None, rows: Sequence[Row[Any]]
    ) -> Seal:
        tiles = TileStore(connection)
        frontier = tiles.frontier(0 if last is None else last.size)
        n, first = 1 if last is None else last.n + 1, frontier.size
        added, completed = [], []
        for each, leaves in _runs(rows, first):
            added.append(each)
            for leaf in leaves:
                completed += frontier.append(leaf)
        tiles.write(completed)
        registry = registry_digest(connection)
        if before is not None and _unexplained(before.registry, registry):
            log.error("audit.registry_changed", version=registry.version)
        body = SealBody(
            n=n,
            at=connection.exec_driver_sql("SELECT pg_catalog.clock_timestamp()").scalar_one(),
            log=uuid7() if before is None else before.log,
            system=connection.exec_driver_sql(_IDENTITY).scalar_one(),
            previous="" if last is None else checkpoint_digest(last.checkpoint),
            decided=self._decided,
            registry=registry,
            rows=tuple(added),
        )
        text = body.encode()
        checkpoint = Checkpoint(
            origin=body.origin, size=frontier.size, root=frontier.root(), extensions=(extension(n, text),)
        )
        note = checkpoints.sign(checkpoint, private_key(key))
        connection.exec_driver_sql(
            _PUT,
            {
                "n": n,
                "at": body.at,
                "size": checkpoint.size,
                "root": checkpoint.root,
                "body": text,
                "checkpoint": note,
                "seal_key": key.id,
            },
        )
        connection.exec_driver_sql(
            _PUT_WRITERS,
            {
                "seal": n,
                "writers": [each.writer for each in added],
                "firsts": [each.first_n for each in added],
                "lasts": [each.last_n for each in added],
                "leaves": [each.first_leaf for each in added],
            },
        )
        return Seal(n=n, size=frontier.size, added=frontier.size - first, checkpoint=note)


def _locked(connection: Connection, *, wait: bool) -> bool:
    if wait:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        return True
    return bool(connection.exec_driver_sql(f"SELECT pg_try_advisory_xact_lock({_LOCK})").scalar())


def _unexplained(before: RegistryDigest, now: RegistryDigest) -> bool:
    """Return whether the registry changed without a recorded change: each of those increments its version."""
    return now.version < before.version or (now.version == before.version and now.digest != before.digest)


def _runs(rows: Iterable[Row[Any]], first_leaf: int) -> Iterator[tuple[SealedRows, list[bytes]]]:
    """Yield the rows of each writer, in runs without a gap, with their leaves.

    A gap is a row that was deleted before it was sealed; a number that comes twice was inserted. Verification names
    both.
    """
    ordered = sorted(rows, key=attrgetter("writer", "n", "id"))
    for writer, of_writer in groupby(ordered, key=attrgetter("writer")):
        run: list[Row[Any]] = []
        for row in [*of_writer, None]:
            if row is not None and (not run or row.n == run[-1].n + 1):
                run.append(row)
            elif row is None or row.n != run[-1].n:
                yield (
                    SealedRows(
                        writer=writer,
                        first_n=run[0].n,
                        last_n=run[-1].n,
                        first_leaf=first_leaf,
                        mac=bytes(run[-1].mac).hex(),
                    ),
                    [leaf_hash(bytes(each.mac)) for each in run],
                )
                first_leaf += len(run)
                run = [] if row is None else [row]
