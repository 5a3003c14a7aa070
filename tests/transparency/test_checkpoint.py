"""receiver.transparency.checkpoint: notes and keys as C2SP writes them."""

from __future__ import annotations

import base64
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from receiver.errors import ProofInvalid
from receiver.transparency import checkpoint
from receiver.transparency.checkpoint import Checkpoint, VerifierKey, sign, verifier_key, verify

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NAME = "clinic.example/redox-receiver"
KEY = verifier_key(NAME, PRIVATE)
ROOT = sha256(b"root").digest()
STATE = Checkpoint(origin=NAME, size=20852163, root=ROOT, extensions=("registry abc",))
NOTE = sign(STATE, PRIVATE)
UNSIGNED = NOTE.rpartition(" ")[0]


def test_the_text_is_written_by_hand() -> None:
    """The note is what the specification says, put together here without our code, and signed over exactly that."""
    text = f"{NAME}\n20852163\n{base64.b64encode(ROOT).decode()}\nregistry abc\n"
    public = PRIVATE.public_key().public_bytes_raw()
    key_hash = sha256(NAME.encode() + b"\n\x01" + public).digest()[:4]
    signature = base64.b64encode(key_hash + PRIVATE.sign(text.encode())).decode()
    encoded = base64.b64encode(b"\x01" + public).decode()
    assert f"{text}\n\u2014 {NAME} {signature}\n" == NOTE
    assert str(KEY) == f"{NAME}+{key_hash.hex()}+{encoded}"


def test_what_was_signed_is_read() -> None:
    """A note that holds gives back its checkpoint, and a key its text."""
    assert verify(NOTE, KEY) == STATE
    assert VerifierKey.parse(f"{KEY}\n") == KEY


def test_signatures_of_others_are_ignored() -> None:
    """A witness's line before or behind ours changes nothing."""
    text, signatures = NOTE.split("\n\n")
    witness = "\u2014 witness.example " + base64.b64encode(bytes(68)).decode() + "\n"
    assert verify(f"{text}\n\n{witness}{signatures}", KEY) == STATE
    assert verify(f"{text}\n\n{signatures}{witness}", KEY) == STATE


@pytest.mark.parametrize(
    "note",
    [
        "",
        NOTE[:-1],
        NOTE.replace("20852163", "20852164"),
        NOTE.replace("registry abc", "registry abd"),
        NOTE.replace("\u2014", "-"),
        NOTE.replace(f"\u2014 {NAME}", "\u2014 other.example"),
        NOTE.replace("\n\n", "\n"),
        f"{UNSIGNED} !!\n",
        f"{UNSIGNED} {base64.b64encode(KEY.key_hash + bytes(64)).decode()}\n",
    ],
)
def test_changed_notes_fail(note: str) -> None:
    """A changed text, signature or form does not hold."""
    with pytest.raises(ProofInvalid):
        verify(note, KEY)


@pytest.mark.parametrize(
    "text",
    [
        f"{NAME}\n07\n{base64.b64encode(ROOT).decode()}\n",
        f"{NAME}\n7\n",
        f"{NAME}\n7\nAAAA\n",
        f"{NAME}\n-7\n{base64.b64encode(ROOT).decode()}\n",
    ],
)
def test_a_note_that_is_no_checkpoint_fails(text: str) -> None:
    """A signature over something else makes it no checkpoint."""
    signature = base64.b64encode(KEY.key_hash + PRIVATE.sign(text.encode())).decode()
    with pytest.raises(ProofInvalid):
        verify(f"{text}\n\u2014 {NAME} {signature}\n", KEY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        f"{NAME}+00000000+{str(KEY).rpartition('+')[2]}",
        f"{NAME}+{KEY.key_hash.hex()}+AAAA",
        "a b+00000000+AA==",
        f"{NAME}+{KEY.key_hash.hex()}+\u00e9",
    ],
)
def test_damaged_keys_are_refused(text: str) -> None:
    """A key whose parts do not agree is not taken."""
    with pytest.raises(ProofInvalid):
        VerifierKey.parse(text)


@pytest.mark.parametrize(
    "state",
    [{"origin": ""}, {"origin": "a\nb"}, {"size": -1}, {"root": b""}, {"extensions": ("",)}, {"extensions": ("a\nb",)}],
)
def test_what_the_format_cannot_hold_is_refused(state: dict[str, object]) -> None:
    """A checkpoint that could be read in two ways is not made."""
    with pytest.raises(ProofInvalid):
        Checkpoint(**({"origin": NAME, "size": 1, "root": ROOT} | state))  # type: ignore[arg-type]


def test_a_name_with_a_space_is_refused() -> None:
    """A key's name stands between separators."""
    with pytest.raises(ProofInvalid, match="is not a valid key name"):
        verifier_key("a b", PRIVATE)


def test_the_module_names_its_formats() -> None:
    """The specifications that others implement are named where the code is."""
    assert "c2sp.org/tlog-checkpoint" in str(checkpoint.__doc__)
