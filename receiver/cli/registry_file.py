"""The registry file of `registry apply`: its types, and how it is read.

Secrets are in separate files, which it names.
"""

from __future__ import annotations

import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from receiver.errors import ConfigurationError
from receiver.protocol.registry import Environment, SourcesPolicy, TestPolicy, UnknownSourcePolicy, default_test_policy


class WantedCredential(msgspec.Struct, kw_only=True, frozen=True):
    """A credential. `file` holds its secret, `keys_file` its public keys, NAME_file a second secret of its kind.

    Paths are relative to the registry file. A time without an offset is UTC. Other fields are the settings of its kind,
    as `credential list --json` shows them.
    """

    kind: str
    file: str | None = None
    keys_file: str | None = None
    label: str | None = None
    expires_at: datetime | None = None

    @property
    def ends(self) -> datetime | None:
        """The time at which the credential expires, aware."""
        time = self.expires_at
        return time if time is None or time.tzinfo is not None else time.replace(tzinfo=UTC)


class WantedSource(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An accepted source. Without `id`: messages that name no source."""

    id: str | None = None
    name: str | None = None


class WantedDestination(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A destination. A missing field has the default of `destination add`. `expect_every`: seconds."""

    environment: Environment = "development"
    enabled: bool = True
    require: list[str] = msgspec.field(default_factory=lambda: ["token"])
    sources_policy: SourcesPolicy = "registered"
    on_unknown_source: UnknownSourcePolicy = "reject"
    test_messages: TestPolicy | None = None
    reply_with: str | None = None
    expect_every: Annotated[int, msgspec.Meta(ge=1, le=365 * 24 * 3600)] | None = None
    credentials: list[dict[str, Any]] = []
    sources: list[WantedSource] = []
    handlers: list[str] = []

    @property
    def columns(self) -> dict[str, Any]:
        """The columns of the destination's row."""
        content = {name: getattr(self, name) for name in COLUMNS}
        return content | {"test_messages": self.test_messages or default_test_policy(self.environment)}


class Wanted(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The whole file: tables `[destinations.NAME]`."""

    destinations: dict[str, WantedDestination]


COLUMNS: Final = (
    "environment",
    "enabled",
    "require",
    "sources_policy",
    "on_unknown_source",
    "test_messages",
    "reply_with",
    "expect_every",
)


def read(path: Path) -> Wanted:
    """Read and parse the file. Raises ConfigurationError."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Wanted)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as exc:
        raise ConfigurationError(f"{path}: {exc}") from exc
