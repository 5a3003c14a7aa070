"""Finding an OAuth key: a PEM or JWK file, or an environment variable.

May not keep or print what it reads; what a key must be is receiver.protocol.credentials' to say.
"""

from __future__ import annotations

import os
from pathlib import Path

from receiver.errors import ConfigurationError
from receiver.protocol.credentials import OAuthKey, load_oauth_key

# No private key of a useful size comes near this; a wrong path may name something that never ends.
_LARGEST_FILE = 64 * 1024


def oauth_key_from_file(
    path: str | os.PathLike[str], *, client_id: str, kid: str | None = None, scope: str | None = None
) -> OAuthKey:
    """The key in a PEM or JWK file. Raises ConfigurationError naming the file."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(_LARGEST_FILE + 1)
    except OSError as exc:
        raise ConfigurationError(
            f"the private key {path} can't be read ({exc.strerror}); check the path, and who may read it"
        ) from exc
    if len(text) > _LARGEST_FILE:
        raise ConfigurationError(f"{path} is too large to be a private key")
    try:
        return load_oauth_key(text, client_id=client_id, kid=kid, scope=scope)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{path}: {exc}") from exc


def oauth_key_from_env(variable: str, *, client_id: str, kid: str | None = None, scope: str | None = None) -> OAuthKey:
    """The key in an environment variable. Raises ConfigurationError naming the variable."""
    text = os.environ.get(variable)
    if text is None:
        raise ConfigurationError(f"{variable} is not set; it must hold the private key as PEM or JWK")
    try:
        return load_oauth_key(text, client_id=client_id, kid=kid, scope=scope)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{variable}: {exc}") from exc
