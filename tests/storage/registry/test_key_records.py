"""The keys on record in the database."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import Engine

from receiver.errors import ConfigurationError
from receiver.keyring import Keyring, create
from receiver.storage.registry.key_records import check_keys, record_keys


def test_a_host_with_the_right_keyring_passes(engine: Engine, keyring: Keyring) -> None:
    """Recording keys twice, or concurrently, is harmless; a new key is added."""
    with engine.begin() as first, engine.begin() as second:
        record_keys(first, keyring)
        thread = threading.Thread(target=record_keys, args=(second, keyring))
        thread.start()
        first.commit()
        thread.join()
    with engine.begin() as connection:
        check_keys(connection, keyring)
        grown = keyring.with_new("payload", keyring.keys[0].created)
        check_keys(connection, grown)
        record_keys(connection, grown)
        with pytest.raises(ConfigurationError, match=f"this host lacks key {grown.keys[-1].id}"):
            check_keys(connection, keyring)


def test_a_host_with_another_keyring_fails(engine: Engine, keyring: Keyring) -> None:
    """It lacks a key, or has another under the same id; or no key is on record."""
    with engine.begin() as connection:
        with pytest.raises(ConfigurationError, match="keys init"):
            check_keys(connection, keyring)
        record_keys(connection, keyring)
        with pytest.raises(ConfigurationError, match="RECEIVER_KEYRING"):
            check_keys(connection, create(keyring.keys[0].created))
        connection.exec_driver_sql("UPDATE keys SET fingerprint = 'x' WHERE purpose = 'index'")
        with pytest.raises(ConfigurationError, match=f"holds another key {keyring.current('index').id}"):
            check_keys(connection, keyring)


def test_no_key_is_in_the_database(engine: Engine, keyring: Keyring) -> None:
    """Only fingerprints are."""
    with engine.begin() as connection:
        record_keys(connection, keyring)
        rows = str(connection.exec_driver_sql("SELECT * FROM keys").all())
    assert not [key for key in keyring.keys if key.secret.hex() in rows]
