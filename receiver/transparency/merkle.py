"""The Merkle tree of RFC 9162 section 2.1: leaf and node hashes, roots, inclusion proofs and consistency proofs.

The hash is SHA-256. A tree of `size` leaves is addressed by its complete subtrees: `(level, index)` names the subtree
over the leaves `index << level` up to, not including, `(index + 1) << level`.

Must not store anything: a function that looks up the hash of a complete subtree is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Final

from receiver.errors import ProofInvalid

HASH_BYTES: Final = 32
# RFC 9162 section 2.1.1: the root of a tree without leaves.
EMPTY_ROOT: Final = sha256(b"").digest()

# (level, index) -> the hash of that complete subtree. Raises KeyError where it is not known.
Subtree = Callable[[int, int], bytes]


def leaf_hash(entry: bytes) -> bytes:
    """The hash of one entry (RFC 9162 section 2.1.1)."""
    return sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash over two subtrees (RFC 9162 section 2.1.1)."""
    return sha256(b"\x01" + left + right).digest()


class Frontier:
    """The right edge of a growing tree: enough to append leaves and to know the root, in O(log size) bytes.

    `hashes` are those of the complete subtrees that `size` is the sum of, largest first.
    """

    def __init__(self, size: int = 0, hashes: Iterable[bytes] = ()) -> None:
        """Raises ValueError when there are more or fewer hashes than the bits that are set in `size`."""
        self.size = size
        self._hashes = [*hashes]
        if len(self._hashes) != size.bit_count():
            raise ValueError(f"a frontier of {size} leaves has {size.bit_count()} hashes, not {len(self._hashes)}")

    @property
    def hashes(self) -> tuple[bytes, ...]:
        """The complete subtrees' hashes, largest first."""
        return tuple(self._hashes)

    def append(self, leaf: bytes) -> list[tuple[int, int, bytes]]:
        """Append the hash of a leaf. Returns the subtrees it completes, the leaf first: (level, index, hash)."""
        completed = [(0, self.size, leaf)]
        current, index, level = leaf, self.size, 0
        while index & 1:
            current = node_hash(self._hashes.pop(), current)
            level, index = level + 1, index >> 1
            completed.append((level, index, current))
        self._hashes.append(current)
        self.size += 1
        return completed

    def root(self) -> bytes:
        """The root of the tree as it stands."""
        if not self._hashes:
            return EMPTY_ROOT
        root = self._hashes[-1]
        for each in reversed(self._hashes[:-1]):
            root = node_hash(each, root)
        return root


def root_of(size: int, subtree: Subtree) -> bytes:
    """The root of the first `size` leaves."""
    return EMPTY_ROOT if size == 0 else _range_hash(0, size, subtree)


def inclusion_proof(index: int, size: int, subtree: Subtree) -> list[bytes]:
    """The path of leaf `index` in the tree of `size` leaves (RFC 9162 section 2.1.3.1), nearest hash first.

    Raises ValueError when the tree has no such leaf.
    """
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {index}")
    path: list[bytes] = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append(_range_hash(middle, end, subtree))
            end = middle
        else:
            path.append(_range_hash(start, middle, subtree))
            start = middle
    return path[::-1]


def consistency_proof(earlier: int, later: int, subtree: Subtree) -> list[bytes]:
    """The proof that the tree of `later` leaves extends that of `earlier` ones (RFC 9162 section 2.1.4.1).

    Raises ValueError unless 0 < earlier <= later.
    """
    if not 0 < earlier <= later:
        raise ValueError(f"no tree of {later} leaves extends one of {earlier}")
    path: list[bytes] = []
    start, end, whole = 0, later, True
    while earlier != end:
        middle = start + _split(end - start)
        if earlier <= middle:
            path.append(_range_hash(middle, end, subtree))
            end = middle
        else:
            path.append(_range_hash(start, middle, subtree))
            start, whole = middle, False
    if not whole:
        path.append(_range_hash(start, end, subtree))
    return path[::-1]


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> None:
    """Check that `leaf`, the hash of a leaf, is leaf `index` of the tree with that root (RFC 9162 section 2.1.3.2).

    Raises ProofInvalid.
    """
    if not 0 <= index < size:
        raise ProofInvalid(f"a tree of {size} leaves has no leaf {index}")
    result = leaf
    for each, from_left in zip(path, _sides(index, size - 1, len(path)), strict=True):
        result = node_hash(each, result) if from_left else node_hash(result, each)
    if result != root:
        raise ProofInvalid("the inclusion proof does not lead to the checkpoint's root")


def verify_consistency(earlier: int, earlier_root: bytes, later: int, later_root: bytes, path: Sequence[bytes]) -> None:
    """Check that the later tree extends the earlier one (RFC 9162 section 2.1.4.2).

    Raises ProofInvalid.
    """
    if not 0 < earlier <= later:
        raise ProofInvalid(f"no tree of {later} leaves extends one of {earlier}")
    if earlier == later:
        if path or earlier_root != later_root:
            raise ProofInvalid("two checkpoints of one size have different roots")
        return
    hashes = [*path] if earlier & (earlier - 1) else [earlier_root, *path]
    if not hashes:
        raise ProofInvalid("the consistency proof is too short")
    node, last = earlier - 1, later - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    first = second = hashes[0]
    for each, from_left in zip(hashes[1:], _sides(node, last, len(hashes) - 1), strict=True):
        if from_left:
            first, second = node_hash(each, first), node_hash(each, second)
        else:
            second = node_hash(second, each)
    if first != earlier_root:
        raise ProofInvalid("the consistency proof does not lead to the earlier root")
    if second != later_root:
        raise ProofInvalid("the consistency proof does not lead to the later root")


def _split(size: int) -> int:
    """The largest power of two that is smaller than `size`."""
    return 1 << (size - 1).bit_length() - 1


def _sides(node: int, last: int, count: int) -> Iterator[bool]:
    """Whether each of `count` hashes of a path joins from the left, on the way up from `node` of a level that ends with
    `last` (RFC 9162 section 2.1.3.2, step 4). Raises ProofInvalid when the way has another length.
    """
    for _ in range(count):
        if last == 0:
            raise ProofInvalid("the proof is too long")
        from_left = bool(node & 1) or node == last
        yield from_left
        while from_left and not node & 1 and node:
            node, last = node >> 1, last >> 1
        node, last = node >> 1, last >> 1
    if last != 0:
        raise ProofInvalid("the proof is too short")


def _range_hash(start: int, end: int, subtree: Subtree) -> bytes:
    """The hash over the leaves from `start` up to, not including, `end`; `start` begins a subtree that large."""
    size = end - start
    if size & (size - 1) == 0:
        level = size.bit_length() - 1
        return subtree(level, start >> level)
    middle = start + _split(size)
    return node_hash(_range_hash(start, middle, subtree), _range_hash(middle, end, subtree))
