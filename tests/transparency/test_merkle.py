"""receiver.transparency.merkle, checked against pymerkle and by mutation of valid proofs."""

from __future__ import annotations

from collections.abc import Callable

import pymerkle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver.errors import ProofInvalid
from receiver.transparency import merkle

ENTRIES = [b"entry %d" % number for number in range(70)]


class Tree:
    """A tree and all its complete subtrees, filled by a Frontier."""

    def __init__(self, size: int) -> None:
        self.frontier = merkle.Frontier()
        self.subtrees: dict[tuple[int, int], bytes] = {}
        for entry in ENTRIES[:size]:
            for level, index, value in self.frontier.append(merkle.leaf_hash(entry)):
                self.subtrees[level, index] = value

    def __call__(self, level: int, index: int) -> bytes:
        return self.subtrees[level, index]


def oracle(size: int) -> pymerkle.InmemoryTree:
    """The same tree in a library that is not ours."""
    tree = pymerkle.InmemoryTree(algorithm="sha256")
    for entry in ENTRIES[:size]:
        tree.append_entry(entry)
    return tree


@pytest.mark.parametrize("size", [*range(1, 34), 63, 64, 65])
def test_roots(size: int) -> None:
    """The root is that of another implementation of RFC 9162, from the frontier and from the subtrees alike."""
    tree = Tree(size)
    assert tree.frontier.root() == merkle.root_of(size, tree) == oracle(size).get_root()


def test_empty() -> None:
    """A tree without leaves has the root that RFC 9162 gives it."""
    assert merkle.Frontier().root() == merkle.root_of(0, Tree(0)) == merkle.EMPTY_ROOT


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 13, 33, 64])
def test_a_frontier_is_resumed(size: int) -> None:
    """A frontier that was stored and read again goes on as if it had not been."""
    tree = Tree(size)
    resumed = merkle.Frontier(tree.frontier.size, tree.frontier.hashes)
    assert resumed.append(merkle.leaf_hash(b"next")) == tree.frontier.append(merkle.leaf_hash(b"next"))
    assert resumed.root() == tree.frontier.root()


def test_a_frontier_of_another_size_is_refused() -> None:
    """A frontier has as many hashes as its size has bits that are set."""
    with pytest.raises(ValueError, match="has 2 hashes, not 1"):
        merkle.Frontier(3, [bytes(32)])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 21, 33, 64, 70])
def test_every_leaf_is_proved(size: int) -> None:
    """The path of every leaf verifies, here and by the other library's own check of the same hashes."""
    tree, root = Tree(size), oracle(size).get_root()
    for index, entry in enumerate(ENTRIES[:size]):
        path = merkle.inclusion_proof(index, size, tree)
        merkle.verify_inclusion(merkle.leaf_hash(entry), index, size, path, root)
        theirs = oracle(size).prove_inclusion(index + 1, size).serialize()["path"]
        assert [bytes.fromhex(each) for each in theirs[1:]] == path


@pytest.mark.parametrize("later", [1, 2, 3, 5, 8, 13, 21, 33, 64, 70])
def test_every_extension_is_proved(later: int) -> None:
    """Each tree is proved to extend each smaller one."""
    tree = Tree(later)
    for earlier in range(1, later + 1):
        path = merkle.consistency_proof(earlier, later, tree)
        merkle.verify_consistency(earlier, oracle(earlier).get_root(), later, oracle(later).get_root(), path)


@pytest.mark.parametrize(
    "call",
    [
        lambda tree: merkle.inclusion_proof(5, 5, tree),
        lambda tree: merkle.inclusion_proof(-1, 5, tree),
        lambda tree: merkle.consistency_proof(0, 5, tree),
        lambda tree: merkle.consistency_proof(6, 5, tree),
    ],
)
def test_what_no_tree_has_is_not_proved(call: Callable[[Tree], object]) -> None:
    """There is no path for a leaf that is not there, nor to a tree that is larger."""
    with pytest.raises(ValueError, match="tree of"):
        call(Tree(5))


@given(size=st.integers(1, 70), data=st.data())
@settings(deadline=None)
def test_changed_inclusion_proofs_fail(size: int, data: st.DataObject) -> None:
    """A proof with another leaf, index, size, hash or length does not hold."""
    tree = Tree(size)
    root, index = tree.frontier.root(), data.draw(st.integers(0, size - 1))
    path, leaf = merkle.inclusion_proof(index, size, tree), merkle.leaf_hash(ENTRIES[index])
    wrong = [
        (merkle.leaf_hash(b"another"), index, size, path, root),
        (leaf, index, size, [*path, root], root),
        (leaf, size, size, path, root),
        (leaf, index, size, path, merkle.leaf_hash(b"root")),
    ]
    if path:
        at = data.draw(st.integers(0, len(path) - 1))
        wrong += [
            (leaf, index, size, [*path[:at], bytes(32), *path[at + 1 :]], root),
            (leaf, index, size, path[:-1], root),
            (leaf, index, size, path[1:], root),
        ]
    for each in wrong:
        with pytest.raises(ProofInvalid):
            merkle.verify_inclusion(*each)


@given(later=st.integers(1, 70), data=st.data())
@settings(deadline=None)
def test_changed_consistency_proofs_fail(later: int, data: st.DataObject) -> None:
    """A proof with another root, size, hash or length does not hold."""
    tree, earlier = Tree(later), data.draw(st.integers(1, later))
    old, new = Tree(earlier).frontier.root(), tree.frontier.root()
    path = merkle.consistency_proof(earlier, later, tree)
    wrong = [
        (earlier, bytes(32), later, new, path),
        (earlier, old, later, bytes(32), path),
        (earlier, old, later, new, [*path, new]),
        (0, old, later, new, path),
        (later + 1, old, later, new, path),
    ]
    if path:
        at = data.draw(st.integers(0, len(path) - 1))
        wrong += [
            (earlier, old, later, new, [*path[:at], bytes(32), *path[at + 1 :]]),
            (earlier, old, later, new, path[:-1]),
            (earlier, old, later, new, path[1:]),
            (earlier, old, later, new, []),
        ]
    for each in wrong:
        with pytest.raises(ProofInvalid):
            merkle.verify_consistency(*each)
