"""Proof files: an entry's place in a log, its path, and a signed checkpoint, in one text (c2sp.org/tlog-proof).

A consistency proof has no format of C2SP's; ours is the same text with `consistency` in its first line, both
checkpoints at its end.

Must not know what an entry says.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from receiver.errors import ProofInvalid
from receiver.transparency import checkpoint as checkpoints
from receiver.transparency.checkpoint import Checkpoint, VerifierKey
from receiver.transparency.merkle import HASH_BYTES, leaf_hash, verify_consistency, verify_inclusion

INCLUSION: Final = "c2sp.org/tlog-proof@v1"
CONSISTENCY: Final = "redox-receiver/consistency@v1"
# A path in a tree of 2^63 leaves.
_MAX_HASHES: Final = 126


@dataclass(frozen=True, kw_only=True, slots=True)
class InclusionProof:
    """That leaf `index` is in the tree of `note`, a signed checkpoint. `entry`: the bytes whose hash is the leaf."""

    index: int
    path: tuple[bytes, ...]
    note: str
    entry: bytes

    def text(self) -> str:
        """As a file; the entry is the `extra` line, so that the file needs nothing else."""
        return "\n".join(
            (
                INCLUSION,
                f"extra {_encoded(self.entry)}",
                f"index {self.index}",
                *map(_encoded, self.path),
                "",
                self.note,
            )
        )

    @classmethod
    def parse(cls, text: str) -> InclusionProof:
        """Read a file. Raises ProofInvalid."""
        head, _, note = text.partition("\n\n")
        first, *lines = head.split("\n")
        if first != INCLUSION or [line.partition(" ")[0] for line in lines[:2]] != ["extra", "index"]:
            raise ProofInvalid(f"not an inclusion proof: the file begins with {INCLUSION}, an extra and an index line")
        return cls(
            entry=_decoded(lines[0].removeprefix("extra ")),
            index=_number(lines[1].removeprefix("index ")),
            path=_hashes(lines[2:]),
            note=note,
        )

    def verify(self, key: VerifierKey) -> Checkpoint:
        """Check the signature and the path; the checkpoint that the entry is in. Raises ProofInvalid."""
        checkpoint = checkpoints.verify(self.note, key)
        verify_inclusion(leaf_hash(self.entry), self.index, checkpoint.size, self.path, checkpoint.root)
        return checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsistencyProof:
    """That the tree of the signed checkpoint `later` extends that of `earlier`."""

    path: tuple[bytes, ...]
    earlier: str
    later: str

    def text(self) -> str:
        """As a file."""
        return "\n".join((CONSISTENCY, *map(_encoded, self.path), "", self.earlier, self.later))

    @classmethod
    def parse(cls, text: str) -> ConsistencyProof:
        """Read a file. Raises ProofInvalid."""
        head, _, notes = text.partition("\n\n")
        first, *lines = head.split("\n")
        parts = notes.split("\n\n")
        # Each note is a text and its signatures, an empty line between them, and another between the two notes.
        if first != CONSISTENCY or len(parts) != 4:
            raise ProofInvalid(f"not a consistency proof: the file begins with {CONSISTENCY} and ends with two notes")
        return cls(path=_hashes(lines), earlier=f"{parts[0]}\n\n{parts[1]}\n", later=f"{parts[2]}\n\n{parts[3]}")

    def verify(self, key: VerifierKey) -> tuple[Checkpoint, Checkpoint]:
        """Check both signatures and the path; the two checkpoints. Raises ProofInvalid."""
        earlier, later = checkpoints.verify(self.earlier, key), checkpoints.verify(self.later, key)
        if earlier.origin != later.origin:
            raise ProofInvalid("the two checkpoints are of different logs")
        verify_consistency(earlier.size, earlier.root, later.size, later.root, self.path)
        return earlier, later


def _encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ProofInvalid("not valid base64") from None


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 19):
        raise ProofInvalid("the index is not a number")
    return int(text)


def _hashes(lines: Sequence[str]) -> tuple[bytes, ...]:
    hashes = tuple(map(_decoded, lines))
    if len(hashes) > _MAX_HASHES or any(len(each) != HASH_BYTES for each in hashes):
        raise ProofInvalid(f"a path has at most {_MAX_HASHES} hashes of {HASH_BYTES} bytes")
    return hashes
