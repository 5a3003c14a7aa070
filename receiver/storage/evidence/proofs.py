"""Proofs from the audit's log: its newest checkpoint, that a row is in it, and that it extends an earlier checkpoint.

Only reads. A proof is checked with receiver.transparency, which needs the public key alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from sqlalchemy import Connection, Row

from receiver.errors import Conflict, NotFound, ProofInvalid
from receiver.keyring import Keyring
from receiver.storage.evidence.seals import SealBody, public_key
from receiver.storage.evidence.tiles import TileStore
from receiver.transparency import checkpoint as checkpoints
from receiver.transparency.checkpoint import Checkpoint, VerifierKey
from receiver.transparency.merkle import consistency_proof, inclusion_proof
from receiver.transparency.proof_file import ConsistencyProof, InclusionProof

_LAST: Final = "SELECT n, size, body, checkpoint, seal_key FROM audit_seals ORDER BY n DESC LIMIT 1"
_ROW: Final = "SELECT writer, n, mac FROM audit_events WHERE id = %(id)s"
_PLACE: Final = """
SELECT first_leaf + %(n)s - first_n FROM audit_seal_writers
WHERE writer = %(writer)s AND %(n)s BETWEEN first_n AND last_n"""


def newest_checkpoint(connection: Connection) -> str:
    """Return the newest checkpoint, a signed note. Raises NotFound when nothing was sealed yet."""
    return str(_last(connection).checkpoint)


def public_keys(connection: Connection, keyring: Keyring) -> dict[str, VerifierKey]:
    """Return the public half of each key for `seal`, by the key's id: empty when nothing was sealed yet.

    The name of the log is part of a public key, and the log gets it with its first seal.
    """
    try:
        log_id = SealBody.decode(_last(connection).body).log
    except NotFound:
        return {}
    return {key.id: public_key(key, log_id) for key in keyring.keys if key.purpose == "seal"}


def prove_row(connection: Connection, number: int) -> InclusionProof:
    """Return the proof that audit row `number` is in the log of the newest checkpoint.

    Raises NotFound when there is no such row, and Conflict when it is not sealed.
    """
    row = connection.exec_driver_sql(_ROW, {"id": number}).one_or_none()
    if row is None:
        raise NotFound(f"there is no audit row {number}: see `redox-receiver audit list`")
    last = _last(connection)
    index = connection.exec_driver_sql(_PLACE, {"writer": row.writer, "n": row.n}).scalar()
    if index is None:
        raise Conflict(f"audit row {number} is not sealed yet: run `redox-receiver audit checkpoint`, and try again")
    path = inclusion_proof(index, last.size, TileStore(connection).subtree)
    return InclusionProof(index=index, path=tuple(path), note=last.checkpoint, entry=bytes(row.mac))


def prove_growth(connection: Connection, keyring: Keyring, earlier: str) -> ConsistencyProof:
    """Return the proof that the log of the newest checkpoint extends that of `earlier`.

    Raises ProofInvalid when `earlier` is not a checkpoint of this log, and NotFound when nothing was sealed.
    """
    last = _last(connection)
    kept = verified(earlier, public_keys(connection, keyring).values())
    if kept.size > last.size:
        raise ProofInvalid(
            f"the log had {kept.size} rows at that checkpoint, and has {last.size}: rows were deleted, or an older "
            "copy of the database was restored"
        )
    path = consistency_proof(kept.size, last.size, TileStore(connection).subtree)
    return ConsistencyProof(path=tuple(path), earlier=earlier, later=last.checkpoint)


def verified(note: str, keys: Iterable[VerifierKey]) -> Checkpoint:
    """Return what the note says when one of the keys signed it. Raises ProofInvalid."""
    failure = ProofInvalid("no key for `seal` is in the keyring")
    for key in keys:
        try:
            return checkpoints.verify(note, key)
        except ProofInvalid as exc:
            failure = exc
    raise failure


def _last(connection: Connection) -> Row[Any]:
    row = connection.exec_driver_sql(_LAST).one_or_none()
    if row is None:
        raise NotFound("no audit row is sealed yet: run `redox-receiver audit checkpoint`")
    return row
