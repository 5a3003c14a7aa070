"""The keyring: a file of keys that only its owner reads, and whose keys are told to nobody."""

from __future__ import annotations

import base64
import hmac
import json
import os
import resource
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from receiver.errors import ConfigurationError, UnknownKey
from receiver.keyring import PURPOSES, Key, Keyring, create, load_keyring

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A saved keyring."""
    create(NOW).save(tmp_path / "keyring.json")
    return tmp_path / "keyring.json"


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    """Every key with its id, purpose and time."""
    keyring = create(NOW)
    keyring.save(tmp_path / "new" / "keyring.json")
    assert load_keyring(tmp_path / "new" / "keyring.json").keys == keyring.keys
    assert {key.purpose for key in keyring.keys} == set(PURPOSES)


def test_the_file_is_its_owners_alone(path: Path) -> None:
    """Whatever the umask; and so is a directory that is made for it."""
    old = os.umask(0)
    try:
        create(NOW).save(path)
        create(NOW).save(path.parent / "made" / "keyring.json")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((path.parent / "made").stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o601])
def test_a_file_that_others_can_open_is_refused(path: Path, mode: int) -> None:
    """The error names the command that fixes it."""
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=f"chmod 600 {path}"):
        load_keyring(path)


def test_a_missing_file_names_what_makes_one(tmp_path: Path) -> None:
    """Nothing is made unasked."""
    with pytest.raises(ConfigurationError, match="keys init"):
        load_keyring(tmp_path / "nowhere.json")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_no_file_names_the_setting(tmp_path: Path) -> None:
    """A directory, or what the disk does not give back."""
    with pytest.raises(ConfigurationError, match="RECEIVER_KEYRING"):
        load_keyring(tmp_path)


def _entry(**changes: Any) -> dict[str, Any]:
    secret = base64.b64encode(b"k" * 32).decode()
    return {"id": "mac-1", "purpose": "mac", "created": "2026-01-01T00:00:00+00:00", "key": secret} | changes


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"version": 1}',
        b'{"version": 1, "keys": 5}',
        b'{"version": 1, "keys": ["canary"]}',
        b'{"version": 1, "keys": [{}]}',
        json.dumps({"version": 2, "keys": [_entry()]}).encode(),
        json.dumps({"version": 1, "keys": [_entry(key="canary")]}).encode(),
        json.dumps({"version": 1, "keys": [_entry(key=base64.b64encode(b"canary" * 5).decode())]}).encode(),
        json.dumps({"version": 1, "keys": [_entry(created="yesterday")]}).encode(),
        json.dumps({"version": 1, "keys": [_entry(key=None)]}).encode(),
        json.dumps({"version": 1, "keys": [_entry(), _entry(purpose="secret")]}).encode(),
        json.dumps({"version": 1, "keys": [_entry(), _entry(id="mac-2", created="2026-01-01T00:00:00")]}).encode(),
    ],
)
def test_a_damaged_file_is_told_without_its_text(path: Path, damaged: bytes) -> None:
    """Half a file, another version, a key too short, two keys of one id: none is half used, and none is quoted."""
    path.write_bytes(damaged)
    with pytest.raises(ConfigurationError, match="is damaged") as caught:
        load_keyring(path)
    assert "canary" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_saving_leaves_the_old_file_when_it_fails(path: Path) -> None:
    """A disk that takes no more in the middle: the keys that were there are still there, and no remains."""
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            create(NOW).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_file_is_replaced_not_rewritten(path: Path) -> None:
    """A process that has the file open reads the old content to its end."""
    with path.open("rb") as old:
        load_keyring(path).with_new("mac", NOW).save(path)
        assert len(json.load(old)["keys"]) == len(PURPOSES)
    assert len(load_keyring(path).keys) == len(PURPOSES) + 1
    assert list(path.parent.iterdir()) == [path]


def test_no_key_is_in_a_repr() -> None:
    """Neither raw nor as the file writes it."""
    key = Key(id="mac-1", purpose="mac", created=NOW, secret=b"canary-canary-canary-canary-cana")
    text = repr(key) + repr(Keyring([key])) + str(vars(Keyring([key])))
    assert "canary" not in text
    assert base64.b64encode(key.secret).decode() not in text


def test_the_newest_key_of_a_purpose_is_for_what_is_new() -> None:
    """The old one still opens what is old."""
    old = create(NOW)
    new = old.with_new("payload", NOW + timedelta(days=1))
    assert new.current("payload") not in old.keys
    assert new[old.current("payload").id] == old.current("payload")
    assert new.current("mac") == old.current("mac")


def test_a_pending_key_is_not_written_with(path: Path) -> None:
    """It is held and saved, but current only once it is activated: in the file, or by what the database says."""
    old = load_keyring(path)
    old.with_new("payload", NOW + timedelta(days=1), pending=True).save(path)
    ring = load_keyring(path)
    new = ring.keys[-1]
    assert new.pending
    assert ring.current("payload") == old.current("payload")
    ring.with_active(new.id).save(path)
    assert load_keyring(path).current("payload").secret == new.secret
    ring.activate({key.id for key in ring.keys})
    assert ring.current("payload") == new
    ring.activate({key.id for key in old.keys})
    assert ring.current("payload") == old.current("payload")
    assert new.id not in ring.without(new.id)
    with pytest.raises(UnknownKey):
        create(NOW).with_active(new.id)


def test_there_is_one_index_key_for_good() -> None:
    """With another, no digest that is stored would be found again."""
    with pytest.raises(ConfigurationError, match="index key cannot be replaced"):
        create(NOW).with_new("index", NOW)


def test_a_key_is_for_a_known_purpose() -> None:
    """The error lists them."""
    with pytest.raises(ConfigurationError, match="payload, secret, mac, index, token, session"):
        create(NOW).with_new("lunch", NOW)


def test_what_is_missing_is_named() -> None:
    """A purpose without a key, and a key that only another host has."""
    with pytest.raises(ConfigurationError, match="keys new mac"):
        Keyring(()).current("mac")
    with pytest.raises(UnknownKey, match="no key mac-1234"):
        create(NOW)["mac-1234"]


def test_ids_and_fingerprints_differ_and_tell_nothing() -> None:
    """Sixteen keyrings: no two keys share an id or a fingerprint, and neither is a part of the key."""
    keys = [key for _ in range(16) for key in create(NOW).keys]
    assert len({key.id for key in keys}) == len({key.fingerprint for key in keys}) == len(keys)
    assert all(
        key.fingerprint not in key.secret.hex() and key.id.rpartition("-")[2] not in key.secret.hex() for key in keys
    )


def test_a_key_is_derived_as_rfc_5869_says() -> None:
    """HKDF-SHA256 without salt, worked out here step by step; another use is another key."""
    key = Key(id="k", purpose="mac", created=NOW, secret=bytes(range(32)))
    extracted = hmac.digest(bytes(32), key.secret, "sha256")
    assert key.derive("row mac") == hmac.digest(extracted, b"redox-receiver row mac\x01", "sha256")
    assert key.derive("row mac").hex() == ("5c715400d2ec876c17ba874d65d47f6842347a812aca1ccab628b1cfa38aadc1")
    assert key.derive("seal") != key.derive("row mac")


def test_a_fingerprint_never_changes() -> None:
    """It stands in databases: this one was worked out with openssl."""
    key = Key(id="k", purpose="mac", created=NOW, secret=bytes(range(32)))
    assert key.fingerprint == "005a274609039d4a02769bf6c066f6a2"


def test_a_loaded_keyring_reads_the_file_again_for_a_key_that_it_lacks(path: Path) -> None:
    """A key that another process has added is found; this process does not write with it before it is activated."""
    held, old = load_keyring(path), load_keyring(path)
    new = load_keyring(path).with_new("mac", NOW + timedelta(days=1))
    assert not held.refresh()
    new.save(path)
    assert held[new.current("mac").id] == new.current("mac")
    assert held.current("mac") == old.current("mac")
    assert held.keys == new.keys
    assert not held.refresh()


@pytest.mark.parametrize("damage", ["gone", "half written", "readable by others"])
def test_a_file_that_cannot_be_read_takes_no_key_away(path: Path, damage: str) -> None:
    """The keys that were loaded stay; the missing one is named, and found when the file is whole again."""
    held, whole = load_keyring(path), load_keyring(path).with_new("mac", NOW)
    if damage == "gone":
        path.unlink()
    elif damage == "half written":
        path.write_text("{")
    else:
        whole.save(path)
        path.chmod(0o644)
    with pytest.raises(UnknownKey, match=whole.current("mac").id):
        held[whole.current("mac").id]
    assert held.keys == whole.keys[:-1]
    path.unlink(missing_ok=True)
    whole.save(path)
    assert held[whole.current("mac").id] == whole.current("mac")


def test_a_process_that_holds_keys_leaves_no_core_dump(path: Path) -> None:
    """Whichever process it is: what loads the keyring forbids them, for itself and for what it starts."""
    code = (
        "import resource, sys; from pathlib import Path; from receiver import keyring; "
        "keyring.load_keyring(Path(sys.argv[1])); print(resource.getrlimit(resource.RLIMIT_CORE)[0])"
    )
    most = resource.getrlimit(resource.RLIMIT_CORE)[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (most, most)),
    )
    assert done.stdout == "0\n"
