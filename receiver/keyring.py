"""Keys by purpose, in one file of mode 0600, each with an id that is stored with what it sealed or signed.

Must not use the keys: sealing, MACs and tokens are made elsewhere. Key material never appears in a repr or an error.

A new key is pending until it is activated: every host must hold it before one of them writes with it. The database
records which keys are active (receiver.storage.registry.key_records); without a database, the file's word counts.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import secrets
import stat
import tempfile
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import sha256
from hmac import digest
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from receiver.errors import ConfigurationError, UnknownKey

# What a key is for. `index` keys digests that are looked up (patients' identifiers, verification tokens): never
# retired, for the digests could not be made again. `seal` signs the audit's checkpoints (Ed25519).
PURPOSES: Final = ("payload", "secret", "mac", "index", "token", "session", "seal")
_LENGTH: Final = 32  # bytes of a key
_VERSION: Final = 1  # of the file
# Tells one content of the file from another: inode, time of change in ns, size.
_Version = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One key of 32 bytes. The newest active key of a purpose seals and signs; the others only open and verify."""

    id: str
    purpose: str
    created: datetime
    secret: bytes = field(repr=False)
    pending: bool = False

    @property
    def fingerprint(self) -> str:
        """Names the key without telling it: stands in the database, so that a host with another key is found out."""
        return digest(self.secret, b"redox-receiver fingerprint", "sha256").hex()[:32]

    def derive(self, use: str) -> bytes:
        """A key of 32 bytes for one use alone (RFC 5869), so that no two uses ever share one."""
        return HKDF(algorithm=SHA256(), length=32, salt=None, info=f"redox-receiver {use}".encode()).derive(self.secret)


class Keyring:
    """The keys of this host. Safe in threads.

    A keyring that was loaded from a file reads the file again when it is asked for a key that it does not hold, so that
    a running process opens and verifies what other processes wrote after `keys activate`.
    """

    def __init__(self, keys: Iterable[Key], path: Path | None = None, read: _Version | None = None) -> None:
        """`path`: the file that `refresh` reads. `read`: which version of that file the keys are."""
        self.keys = tuple(keys)
        self._by_id = {key.id: key for key in self.keys}
        self._current = _newest(key for key in self.keys if not key.pending)
        self._path = path
        self._read = read
        self._lock = threading.Lock()

    def refresh(self) -> bool:
        """Add the keys that were added to the file since it was read; whether there were any.

        A file that cannot be read changes nothing: it may be in the middle of being replaced.
        """
        with self._lock:
            if self._path is None or self._read == _version(self._path):
                return False
            try:
                found = load_keyring(self._path)
            except ConfigurationError:
                return False
            self._read = found._read
            added = tuple(key for key in found.keys if key.id not in self._by_id)
            self._by_id |= {key.id: key for key in added}
            self.keys += added
            return bool(added)

    def activate(self, ids: Collection[str]) -> None:
        """Seal and sign with the newest of the keys `ids` of each purpose, and with no other key."""
        self._current = _newest(key for key in self.keys if key.id in ids)

    def current(self, purpose: str) -> Key:
        """Return the newest active key of `purpose`. Raises ConfigurationError when there is none."""
        try:
            return self._current[purpose]
        except KeyError:
            raise ConfigurationError(
                f"the keyring holds no active key for {purpose}: run `redox-receiver keys new {purpose}`, "
                "and then `redox-receiver keys activate` with its id"
            ) from None

    def __getitem__(self, key_id: str) -> Key:
        """The key of that id. Raises UnknownKey naming the id."""
        key = self._by_id.get(key_id)
        if key is None and self.refresh():
            key = self._by_id.get(key_id)
        if key is None:
            raise UnknownKey(f"the keyring holds no key {key_id}: restore the keyring file that this was written with")
        return key

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._by_id

    def with_new(self, purpose: str, now: datetime, *, pending: bool = False) -> Keyring:
        """Return this keyring with a new key of `purpose`; `pending`: not used for writing before it is activated."""
        if purpose not in PURPOSES:
            raise ConfigurationError(f"{purpose!r} is not a valid purpose of a key: choose {', '.join(PURPOSES)}")
        if purpose == "index" and purpose in self._current:
            raise ConfigurationError(
                "the index key cannot be replaced: stored digests could not be made again with another key"
            )
        secret = secrets.token_bytes(_LENGTH)
        key_id = f"{purpose}-{sha256(secret + b'id').hexdigest()[:8]}"
        return Keyring((*self.keys, Key(id=key_id, purpose=purpose, created=now, secret=secret, pending=pending)))

    def with_active(self, key_id: str) -> Keyring:
        """Return this keyring with one key no longer pending. Raises UnknownKey."""
        active = replace(self[key_id], pending=False)
        return Keyring(active if key.id == key_id else key for key in self.keys)

    def without(self, key_id: str) -> Keyring:
        """Return this keyring without one key."""
        return Keyring(key for key in self.keys if key.id != key_id)

    def save(self, path: Path) -> None:
        """Write the file whole, 0600, or leave the old one as it is."""
        entries = [
            {
                "id": key.id,
                "purpose": key.purpose,
                "created": key.created.isoformat(),
                "key": base64.b64encode(key.secret).decode(),
                **({"pending": True} if key.pending else {}),
            }
            for key in self.keys
        ]
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # 0600
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump({"version": _VERSION, "keys": entries}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).rename(path)
        except BaseException:
            Path(temporary).unlink()
            raise
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)  # the new name, too, outlives a power cut
        finally:
            os.close(directory)


def create(now: datetime) -> Keyring:
    """A new keyring with one key of each purpose."""
    keyring = Keyring(())
    for purpose in PURPOSES:
        keyring = keyring.with_new(purpose, now)
    return keyring


def load_keyring(path: Path) -> Keyring:
    """The keyring in `path`. Raises ConfigurationError: missing, readable by others, or damaged.

    From then on this process, and those that it starts, leave no core dump: it would hold keys and patients' data.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    try:
        with path.open("rb") as file:
            status, text = os.fstat(file.fileno()), file.read()
    except FileNotFoundError:
        raise ConfigurationError(
            f"there is no keyring at {path}: run `redox-receiver keys init`, or restore it"
        ) from None
    except OSError as exc:
        raise ConfigurationError(
            f"the keyring {path} cannot be read ({exc.strerror}): check RECEIVER_KEYRING and the permissions"
        ) from None
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigurationError(f"the keyring {path} can be read by others: run `chmod 600 {path}`")
    try:
        return Keyring(_read(json.loads(text)), path, _version_of(status))
    except (KeyError, TypeError, ValueError):
        # No cause: a JSON error quotes the text.
        raise ConfigurationError(f"the keyring {path} is damaged: restore it from its backup") from None


def _newest(keys: Iterable[Key]) -> dict[str, Key]:
    """Return the newest key of each purpose."""
    return {key.purpose: key for key in sorted(keys, key=lambda key: key.created)}


def _version(path: Path) -> _Version | None:
    try:
        return _version_of(path.stat())
    except OSError:
        return None


def _version_of(status: os.stat_result) -> _Version:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(document: Any) -> list[Key]:
    """Raises KeyError, TypeError, ValueError."""
    if document["version"] != _VERSION:
        raise ValueError("not of this version")
    keys = [
        Key(
            id=str(entry["id"]),
            purpose=str(entry["purpose"]),
            created=datetime.fromisoformat(entry["created"]),
            secret=base64.b64decode(entry["key"], validate=True),
            pending=entry.get("pending", False) is True,
        )
        for entry in document["keys"]
    ]
    if any(len(key.secret) != _LENGTH for key in keys) or len({key.id for key in keys}) != len(keys):
        raise ValueError("a key has 32 bytes and an id of its own")
    return keys
