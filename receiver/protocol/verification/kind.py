"""The base classes of credential kinds: everything that the rest of the program knows about a kind.

Storage, command line, `registry apply` and documents read these descriptors and contain no kind's name. How to add a
kind: deploy/adding-a-credential-kind.md. Must not read a file, a clock or a keyring.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Annotated, Any, ClassVar, Final, Generic, TypeVar

import msgspec

from receiver.errors import ConfigurationError
from receiver.protocol.jose import VerifyingKey
from receiver.protocol.message import Head, Inbound, Verified
from receiver.protocol.registry import Credential, Destination

# A shorter secret could be guessed; the dashboard takes any length. AWS's secret keys have 40 characters.
MIN_SECRET_LENGTH: Final = 24

HOUR: Final = 3600
Seconds = Annotated[int, msgspec.Meta(ge=1, le=24 * HOUR)]


class CredentialSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The content of a credential's `settings` column; a missing setting has its default."""


class SecretStorage(Enum):
    """How the secret of a kind is stored."""

    NONE = "none"  # the kind has no secret
    DIGESTED = "digested"  # as a digest: it is only compared
    SEALED = "sealed"  # encrypted: the secret itself is needed


@dataclass(frozen=True, kw_only=True, slots=True)
class CredentialOption:
    """An option of `credential add`; several kinds may share one. `help`: one sentence, with the unit and default.

    The value is a str. `multiple`: a tuple of str; `flag`: True; `bounds`: an int; `file`: the text of the named file;
    `duration`: seconds.
    """

    name: str
    help: str
    multiple: bool = False
    flag: bool = False
    choices: tuple[str, ...] = ()
    bounds: tuple[int, int] | None = None
    file: bool = False
    duration: bool = False
    metavar: str | None = None

    @property
    def flag_name(self) -> str:
        """The option as an operator writes it: `--jwks-url`."""
        return f"--{self.name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionUse:
    """How a kind uses an option. `setting`: the name of its setting, if it differs from the option's.

    `single`: at most one value of an option that may be repeated. `convert` turns the option's value into the
    setting's; it raises ConfigurationError.
    """

    option: CredentialOption
    setting: str | None = None
    required: bool = False
    single: bool = False
    convert: Callable[[Any], Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCredential:
    """A row without its settings, and the keys that are needed to use it.

    `digest` and `digest_key` belong to a DIGESTED secret; `secret` is a SEALED one, decrypted. `token_keys` sign and
    verify access tokens of the token endpoint. `key_set(url, max_stale)` returns the keys of a URL (none until they are
    fetched), and whether they are older than `max_stale` seconds.
    """

    id: int
    expires_at: datetime | None = None
    revoked: bool = False
    secret: bytes = field(default=b"", repr=False)
    digest: bytes = field(default=b"", repr=False)
    digest_key: bytes = field(default=b"", repr=False)
    token_keys: tuple[VerifyingKey, ...] = field(default=(), repr=False)
    key_set: Callable[[str, int], tuple[tuple[VerifyingKey, ...], bool]] = lambda _url, _seconds: ((), False)

    @property
    def common(self) -> dict[str, Any]:
        """The fields that every credential has."""
        return {"id": self.id, "expires_at": self.expires_at, "revoked": self.revoked}


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherCredential:
    """Another credential of the same kind at the same destination, not revoked."""

    id: int
    settings: Any
    secret: bytes = field(repr=False)


SettingsT = TypeVar("SettingsT", bound=CredentialSettings)
CredentialT = TypeVar("CredentialT", bound=Credential)


class CredentialKind(ABC, Generic[SettingsT, CredentialT]):
    """One way in which Redox authenticates itself.

    `text`: a short description. `settings`: the type of the stored settings. `credential`: the type that verifies
    requests. `options`: the options of `credential add`. `generated_secret`: the name under which a secret that the
    command generates is shown; None if Redox or the operator provides it. `second_secret`: the field of `credential`
    that holds the second line of the secret; its option is --NAME-file. `digest_label` separates the digests of kinds.
    `reasons`: every reason with which the kind refuses a request → its meaning for an operator. `token_endpoint`:
    whether clients get their tokens from this receiver.
    """

    name: ClassVar[str]
    text: ClassVar[str]
    settings: ClassVar[type[CredentialSettings]]
    credential: ClassVar[type[Credential]]
    secret: ClassVar[SecretStorage] = SecretStorage.NONE
    digest_label: ClassVar[str] = ""
    generated_secret: ClassVar[str | None] = None
    second_secret: ClassVar[str | None] = None
    options: ClassVar[tuple[OptionUse, ...]] = ()
    reasons: ClassVar[Mapping[str, str]]
    token_endpoint: ClassVar[bool] = False
    # Whether `check_others` has to be called.
    compares_others: ClassVar[bool] = False

    # --- registration

    def from_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that options give. Raises ConfigurationError for an invalid value."""
        found = {}
        for use in self.options:
            if use.option.name in given:
                value = given[use.option.name]
                if use.single:
                    if len(value) > 1:
                        raise ConfigurationError(f"--kind {self.name} takes only one {use.option.flag_name}")
                    value = value[0]
                elif isinstance(value, tuple):
                    value = list(value)
                found[use.setting or use.option.name] = value if use.convert is None else use.convert(value)
        return found

    def check_secret(self, secret: bytes | None) -> None:
        """Raise ConfigurationError for a missing or superfluous secret, or one that could be guessed."""
        if (secret is not None) != (self.secret is not SecretStorage.NONE):
            raise ConfigurationError(f"kind {self.name} has {'no' if secret is not None else 'a'} secret")
        if secret is not None and len(secret.partition(b"\n")[0]) < MIN_SECRET_LENGTH:
            raise ConfigurationError(
                f"a secret of kind {self.name} has at least {MIN_SECRET_LENGTH} characters: a shorter one could be "
                "guessed"
            )

    def check_others(self, settings: SettingsT, secret: bytes, others: Iterable[OtherCredential]) -> None:
        """Raise ConfigurationError if the new credential would weaken another one of its destination."""

    def normalize(self, settings: SettingsT) -> SettingsT:
        """Return the settings in the form that is stored and compared. Raises ConfigurationError."""
        return settings

    @abstractmethod
    def make(self, settings: SettingsT, stored: StoredCredential) -> CredentialT:
        """Return the credential. Raises ConfigurationError for settings that contradict each other."""

    # --- verification

    def held(self, destination: Destination) -> list[CredentialT]:
        """Return the destination's credentials of this kind, live or not."""
        return [each for each in destination.credentials if isinstance(each, self.credential)]  # type: ignore[misc]  # C

    @abstractmethod
    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:
        """Return whether the head presents something of this kind.

        Called only if the destination requires the kind or holds a live credential of it.
        """

    @abstractmethod
    def check_head(self, head: Head, destination: Destination, now: datetime) -> Verified | BodyKind[Any, Any]:
        """Check what the kind claims, before the body is read: the proof, or the kind whose `verify` needs the body.

        Raises Unverified with one of `reasons`.
        """


class HeadKind(CredentialKind[SettingsT, CredentialT]):
    """A kind that is verified by the head alone."""

    @abstractmethod
    def match(self, head: Head, destination: Destination, now: datetime) -> int:
        """Return the id of the credential that matches. Raises Unverified with one of `reasons`."""

    def check_head(self, head: Head, destination: Destination, now: datetime) -> Verified:
        """Return the proof. Raises Unverified: see `match`."""
        return Verified(credentials=(self.match(head, destination, now),), kinds=frozenset({self.name}))


class BodyKind(CredentialKind[SettingsT, CredentialT]):
    """A kind that needs the body to verify a request."""

    @abstractmethod
    def screen(self, head: Head, destination: Destination, now: datetime) -> None:
        """Raise Unverified if the head alone already shows that `verify` would."""

    @abstractmethod
    def verify(self, inbound: Inbound, destination: Destination, now: datetime) -> Verified:
        """Return the proof, naming the credentials that matched. Raises Unverified with one of `reasons`."""

    def check_head(self, head: Head, destination: Destination, now: datetime) -> BodyKind[SettingsT, CredentialT]:
        """Return itself. Raises Unverified: see `screen`."""
        self.screen(head, destination, now)
        return self
