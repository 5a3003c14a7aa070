"""receiver.transparency.proof_file: proofs as files, checked with the public key alone."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from receiver.errors import ProofInvalid
from receiver.transparency import merkle
from receiver.transparency.checkpoint import Checkpoint, sign, verifier_key
from receiver.transparency.proof_file import ConsistencyProof, InclusionProof
from tests.transparency.test_merkle import ENTRIES, Tree

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NAME = "clinic.example/redox-receiver"
KEY = verifier_key(NAME, PRIVATE)


def note(size: int, *, origin: str = NAME) -> str:
    """The signed checkpoint of the first `size` entries."""
    return sign(Checkpoint(origin=origin, size=size, root=Tree(size).frontier.root()), PRIVATE)


INCLUSION = InclusionProof(
    index=3, entry=ENTRIES[3], note=note(13), path=tuple(merkle.inclusion_proof(3, 13, Tree(13)))
)
CONSISTENCY = ConsistencyProof(path=tuple(merkle.consistency_proof(5, 13, Tree(13))), earlier=note(5), later=note(13))


def test_inclusion() -> None:
    """A proof that was written and read again leads to its checkpoint."""
    proof = InclusionProof.parse(INCLUSION.text())
    assert proof == INCLUSION
    assert proof.verify(KEY).size == 13


def test_consistency() -> None:
    """A proof that was written and read again joins its two checkpoints."""
    proof = ConsistencyProof.parse(CONSISTENCY.text())
    assert proof == CONSISTENCY
    assert [each.size for each in proof.verify(KEY)] == [5, 13]


def test_one_size_twice() -> None:
    """A checkpoint is consistent with itself, without a path."""
    proof = ConsistencyProof(path=(), earlier=note(5), later=note(5))
    assert ConsistencyProof.parse(proof.text()).verify(KEY)


TEXT = INCLUSION.text()


@pytest.mark.parametrize(
    "text",
    [
        "",
        CONSISTENCY.text(),
        TEXT.replace("index 3", "index 4"),
        TEXT.replace("index 3", "index x"),
        TEXT.replace("index 3\n", ""),
        TEXT.replace("extra ", "extra AAAA"),
        TEXT.replace("extra ", "extra !"),
        TEXT.replace("\n\n", "\nAAAA\n\n", 1),
        TEXT.replace("\n13\n", "\n14\n"),
    ],
)
def test_changed_inclusion_proofs_fail(text: str) -> None:
    """A file that was changed, or is another, does not verify."""
    with pytest.raises(ProofInvalid):
        InclusionProof.parse(text).verify(KEY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        TEXT,
        CONSISTENCY.text().replace("\n13\n", "\n14\n"),
        CONSISTENCY.text().replace("\n\n", "\nAAAA\n\n", 1),
        ConsistencyProof(path=CONSISTENCY.path, earlier=note(5), later=note(12)).text(),
    ],
)
def test_changed_consistency_proofs_fail(text: str) -> None:
    """A file that was changed, or is another, does not verify."""
    with pytest.raises(ProofInvalid):
        ConsistencyProof.parse(text).verify(KEY)


def test_two_logs_are_not_consistent() -> None:
    """Checkpoints of two logs prove nothing of each other, even under one key."""
    other = sign(Checkpoint(origin=NAME, size=5, root=Tree(5).frontier.root()), PRIVATE)
    text = other.replace(NAME, "other.example", 1)
    with pytest.raises(ProofInvalid):
        ConsistencyProof(path=CONSISTENCY.path, earlier=text, later=note(13)).verify(KEY)
