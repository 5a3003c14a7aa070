"""Verification of the seals: their signatures, their chain, the Merkle tree, and the rows that they say exist.

Only reads. The tree's roots are computed from the stored leaf hashes; the caller compares each audit row with its leaf.

Must not read the audit's rows itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final
from uuid import UUID

import msgspec
from sqlalchemy import Connection, Row

from receiver.errors import ProofInvalid, UnknownKey
from receiver.keyring import Keyring
from receiver.storage.evidence.proofs import verified
from receiver.storage.evidence.seals import SealBody, checkpoint_digest, extension, public_key, registry_digest
from receiver.storage.evidence.tiles import HEIGHT, TileStore
from receiver.transparency import checkpoint as checkpoints
from receiver.transparency.checkpoint import Checkpoint, VerifierKey
from receiver.transparency.merkle import Frontier, leaf_hash, root_of

_AT_ONCE: Final = 1_000

# A seal, with the rows that it added as the table of writers has them.
_SEALS: Final = """
SELECT s.n, s.size, s.root, s.body, s.checkpoint, s.seal_key, w.rows
FROM audit_seals s LEFT JOIN LATERAL (
    SELECT json_agg(json_build_array(writer, first_n, last_n, first_leaf) ORDER BY first_leaf) AS rows
    FROM audit_seal_writers WHERE seal = s.n) w ON true
ORDER BY s.n"""
_WRITERS: Final = """
SELECT writer, first_n, last_n, first_leaf, seal FROM audit_seal_writers WHERE seal <= {} ORDER BY writer, first_n"""


class BadSeal(Exception):
    """A seal, a hash of the tree, or a sealed row that fails verification; the text names it."""


class SealedTree:
    """The seals of one database. Call `prove` first; then `expect` for each audit row, in the order of (writer, n)."""

    def __init__(self, connection: Connection, keyring: Keyring) -> None:
        self._connection = connection
        self._keyring = keyring
        self._tiles = TileStore(connection)
        self._keys: dict[tuple[str, UUID], VerifierKey] = {}
        self._last: SealBody | None = None
        self.size = 0
        self.seals = 0

    # --- the seals

    def prove(self) -> None:
        """Check every seal's signature, body, place in the chain and root. Raises BadSeal."""
        frontier, previous = Frontier(), ""
        for row in self._stream(_SEALS):
            name = f"audit_seals n {self.seals + 1}"
            if row.n != self.seals + 1:
                raise BadSeal(f"{name}: deleted; the next one is n {row.n}")
            checkpoint, body = self._signed(name, row)
            if body.previous != previous:
                raise BadSeal(f"{name}: does not follow the seal before it")
            if self._last is not None:
                self._prove_follows(name, self._last, body)
            self._grow(name, frontier, checkpoint)
            self.seals, self.size, previous, self._last = row.n, row.size, checkpoint_digest(row.checkpoint), body

    def _signed(self, name: str, row: Row[Any]) -> tuple[Checkpoint, SealBody]:
        try:
            body = SealBody.decode(row.body)
            checkpoint = checkpoints.verify(row.checkpoint, self._key(row.seal_key, body.log))
        except UnknownKey as exc:
            raise BadSeal(f"{name}: signed with key {row.seal_key}, which this keyring lacks") from exc
        except (ProofInvalid, msgspec.MsgspecError) as exc:
            raise BadSeal(f"{name}: edited, or inserted without the key") from exc
        stated = Checkpoint(
            origin=body.origin, size=row.size, root=bytes(row.root), extensions=(extension(row.n, row.body),)
        )
        if checkpoint != stated or body.n != row.n:
            raise BadSeal(f"{name}: edited; its columns are not what its checkpoint says")
        rows = [[str(each.writer), each.first_n, each.last_n, each.first_leaf] for each in body.rows]
        if (row.rows or []) != rows:
            raise BadSeal(f"audit_seal_writers seal {row.n}: rows were edited, inserted or deleted")
        return checkpoint, body

    def _key(self, key_id: str, log_id: UUID) -> VerifierKey:
        found = self._keys.get((key_id, log_id))
        if found is None:
            found = self._keys[key_id, log_id] = public_key(self._keyring[key_id], log_id)
        return found

    @staticmethod
    def _prove_follows(name: str, before: SealBody, body: SealBody) -> None:
        if body.log != before.log:
            raise BadSeal(f"{name}: is of another log")
        old, new = before.registry, body.registry
        if new.version < old.version:
            raise BadSeal(f"registry_version: put back from {old.version} to {new.version} before seal {body.n}")
        if new.version == old.version and new.digest != old.digest:
            raise BadSeal(
                f"registry version {new.version}: a row was changed, inserted, deleted or put back before seal "
                f"{body.n}, without a recorded change"
            )

    def _grow(self, name: str, frontier: Frontier, checkpoint: Checkpoint) -> None:
        """Append the stored leaves of this seal and compare the root, and all stored hashes above them."""
        for index in range(frontier.size, checkpoint.size):
            try:
                for level, number, value in frontier.append(self._tiles.subtree(0, index)):
                    if level and level % HEIGHT == 0 and self._tiles.subtree(level, number) != value:
                        raise BadSeal(f"audit_tiles level {level // HEIGHT}, number {number // 256}: edited")
            except KeyError:
                raise BadSeal(f"audit_tiles level 0, number {index // 256}: deleted, or cut short") from None
        if frontier.root() != checkpoint.root:
            raise BadSeal(f"{name}: the leaf hashes in audit_tiles do not lead to its root: one was edited")

    def registry(self) -> None:
        """Compare the registry with the last seal. Raises BadSeal where it changed and its version did not."""
        if self._last is None:
            return
        now, sealed = registry_digest(self._connection), self._last.registry
        if now.version < sealed.version:
            raise BadSeal(f"registry_version: put back from {sealed.version} to {now.version} after seal {self.seals}")
        if now.version == sealed.version and now.digest != sealed.digest:
            raise BadSeal(
                f"registry version {now.version}: a row was changed, inserted, deleted or put back after seal "
                f"{self.seals}, without a recorded change"
            )

    def extends(self, note: str) -> None:
        """Check that the log still has what it had at a checkpoint that somebody kept. Raises BadSeal, ProofInvalid.

        ProofInvalid: the checkpoint is not one of this log's.
        """
        if self._last is None:
            raise BadSeal("audit_seals: there is none, and a checkpoint of this log was given: all were deleted")
        log_id = self._last.log
        kept = verified(note, (public_key(key, log_id) for key in self._keyring.keys if key.purpose == "seal"))
        if kept.size > self.size:
            raise BadSeal(
                f"audit_seals: the log had {kept.size} rows at the checkpoint given, and has {self.size}: seals and "
                "rows were deleted, or an older copy of the database was restored"
            )
        if root_of(kept.size, self._tiles.subtree) != kept.root:
            raise BadSeal("audit_seals: the log is not the one of the checkpoint given: it was made anew")

    # --- the rows

    def expectation(self) -> SealedRowReader:
        """Return a reader that is given each audit row, in the order of (writer, n).

        Call it before the audit rows are read: what is sealed by then is among them.
        """
        return SealedRowReader(self._stream(_WRITERS.format(self.seals)), self._tiles)

    def _stream(self, query: str) -> Iterator[Row[Any]]:
        with self._connection.exec_driver_sql(query, execution_options={"yield_per": _AT_ONCE}) as rows:
            yield from rows


class SealedRowReader:
    """Compares audit rows with their leaves, and finds sealed rows that are gone."""

    def __init__(self, sealed: Iterator[Row[Any]], tiles: TileStore) -> None:
        self._sealed = sealed
        self._tiles = tiles
        self._run: Row[Any] | None = None
        self._next = 0  # the number of the run that is to come
        self._advance()

    def row(self, writer: UUID, n: int, mac: bytes) -> bool:
        """Check one row. Returns whether it is sealed. Raises BadSeal: it is not what was sealed, or one before it is
        gone.
        """
        while self._run is not None and (self._run.writer, self._run.last_n) < (writer, n):
            self._missing()
        run = self._run
        if run is None or run.writer != writer or n < run.first_n:
            return False
        if n > self._next:
            self._missing()
        if leaf_hash(mac) != self._tiles.subtree(0, run.first_leaf + n - run.first_n):
            raise BadSeal(f"audit_events writer {writer}, n {n}: changed after seal {run.seal}, with the key")
        self._next = n + 1
        if self._next > run.last_n:
            self._advance()
        return True

    def end(self) -> None:
        """Check that no sealed row is missing after the last row. Raises BadSeal."""
        if self._run is not None:
            self._missing()

    def _missing(self) -> None:
        assert self._run is not None
        raise BadSeal(
            f"audit_events writer {self._run.writer}, n {self._next}: deleted after it was sealed (seal "
            f"{self._run.seal})"
        )

    def _advance(self) -> None:
        self._run = next(self._sealed, None)
        if self._run is not None:
            self._next = self._run.first_n
