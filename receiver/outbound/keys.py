"""Loads OAuth keys from a PEM or JWK file, or from an environment variable.

Must not store or print the key. receiver.protocol.api_keys checks the key.
"""

from __future__ import annotations

import os
from pathlib import Path

from receiver.errors import ConfigurationError
from receiver.protocol.api_keys import OAuthKey, load_oauth_key

# Bytes. Real private keys are much smaller. A wrong path may name an endless file.
_LARGEST_FILE = 64 * 1024


def oauth_key_from_file(
    path: str | os.PathLike[str], *, client_id: str, kid: str | None = None, scope: str | None = None
) -> OAuthKey:
    """Load the key from a PEM or JWK file. Raises ConfigurationError, which names the file."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(_LARGEST_FILE + 1)
    except OSError as exc:
        raise ConfigurationError(
            f"cannot read the private key {path} ({exc.strerror}): check the path and its permissions"
        ) from exc
    if len(text) > _LARGEST_FILE:
        raise ConfigurationError(f"{path} is too large to be a private key")
    try:
        return load_oauth_key(text, client_id=client_id, kid=kid, scope=scope)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{path}: {exc}") from exc


def oauth_key_from_env(variable: str, *, client_id: str, kid: str | None = None, scope: str | None = None) -> OAuthKey:
    """Load the key from an environment variable. Raises ConfigurationError, which names the variable."""
    text = os.environ.get(variable)
    if text is None:
        raise ConfigurationError(f"{variable} is not set: set it to the private key as PEM or JWK")
    try:
        return load_oauth_key(text, client_id=client_id, kid=kid, scope=scope)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{variable}: {exc}") from exc
