"""Reading a private key from a file or an environment variable."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from receiver.errors import ConfigurationError
from receiver.outbound import oauth_key_from_env, oauth_key_from_file
from tests.outbound.conftest import KEY, PRIVATE

PEM = PRIVATE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def test_a_file_and_a_variable_give_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same PEM in a file or in a variable is the same key."""
    path = tmp_path / "key.pem"
    path.write_bytes(PEM)
    monkeypatch.setenv("REDOX_KEY", PEM.decode().replace("\n", "\\n"))

    for key in (
        oauth_key_from_file(path, client_id="client-1", kid="kid-1"),
        oauth_key_from_env("REDOX_KEY", client_id="client-1", kid="kid-1"),
    ):
        assert key.private_key.private_numbers() == PRIVATE.private_numbers()
        assert (key.client_id, key.kid) == (KEY.client_id, KEY.kid)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    """The error for a missing, invalid or endless file names the file and the reason."""
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no key")

    for path, says in (
        (tmp_path / "missing.pem", "No such file"),
        (tmp_path, "directory"),
        (wrong, "PEM"),
        (Path("/dev/zero"), "too large"),
    ):
        with pytest.raises(ConfigurationError, match=says) as caught:
            oauth_key_from_file(path, client_id="c", kid="k")
        assert str(path) in str(caught.value)


def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error for a variable that is not set, or has no key, names the variable but not its value."""
    monkeypatch.delenv("REDOX_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="REDOX_KEY is not set"):
        oauth_key_from_env("REDOX_KEY", client_id="c", kid="k")

    monkeypatch.setenv("REDOX_KEY", "canary")
    with pytest.raises(ConfigurationError, match="REDOX_KEY: ") as caught:
        oauth_key_from_env("REDOX_KEY", client_id="c", kid="k")
    assert "canary" not in str(caught.value)
