"""What a credential kind is: one descriptor that says all there is to say of it.

Storage, command line, `registry apply` and documents read these descriptors and know no kind by name
(deploy/authentication.md, "Adding a credential kind"). Must not read a file, a clock or a keyring.
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
from receiver.protocol.registry import MIN_TOKEN_LENGTH, Credential, Destination

HOUR: Final = 3600
Seconds = Annotated[int, msgspec.Meta(ge=1, le=24 * HOUR)]


class Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What stands in a credential's `settings` column; what is left out has its default."""


class Secret(Enum):
    """How a kind's secret is kept."""

    NONE = "none"  # there is none
    DIGESTED = "digested"  # as a digest: it is only compared
    SEALED = "sealed"  # encrypted: it is used


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """An option of `credential add`; several kinds may share one. `help` is one sentence, with the unit and default.

    Its value is a str, or as these say: `multiple`: a tuple of str; `flag`: True; `bounds`: an int; `file`: the text
    of the file that is named; `duration`: seconds.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Takes:
    """How a kind takes an option. `setting`: the setting that it is, where that has another name than the option.

    `one`: of an option that may be repeated, one value at most. `read` makes the setting's value of the option's; it
    raises ConfigurationError.
    """

    option: Option
    setting: str | None = None
    needed: bool = False
    one: bool = False
    read: Callable[[Any], Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """What a row holds beside its settings, with what is needed to use it.

    `digest` and `digest_key` are of a DIGESTED secret, `secret` is a SEALED one, opened. `token_keys` sign and prove
    the access tokens of our own token endpoint. `key_set` finds the keys of a URL, none as long as they were never
    fetched, and whether they are older than that many seconds.
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
class Other:
    """Another live credential of the same kind at the same destination."""

    id: int
    settings: Any
    secret: bytes = field(repr=False)


SettingsT = TypeVar("SettingsT", bound=Settings)
CredentialT = TypeVar("CredentialT", bound=Credential)


class Kind(ABC, Generic[SettingsT, CredentialT]):
    """One way in which Redox authenticates itself.

    `says`: it in a few words. `settings` and `credential`: the types of what is stored and of what requests are judged
    by. `options`: those of `credential add`. `made`: the name under which a secret that we make is shown; None: it is
    made elsewhere. `second_secret`: the field of `credential` that holds the second line of the secret; its option is
    --NAME-file. `digest_label` tells the digests of this kind from those of others. `reasons`: every reason with which
    it refuses, and what that means to an operator. `token_endpoint`: its clients get their tokens from us.
    """

    name: ClassVar[str]
    says: ClassVar[str]
    settings: ClassVar[type[Settings]]
    credential: ClassVar[type[Credential]]
    secret: ClassVar[Secret] = Secret.NONE
    digest_label: ClassVar[str] = ""
    made: ClassVar[str | None] = None
    second_secret: ClassVar[str | None] = None
    options: ClassVar[tuple[Takes, ...]] = ()
    reasons: ClassVar[Mapping[str, str]]
    token_endpoint: ClassVar[bool] = False
    # The head tells all: the body is not needed to verify.
    by_head: ClassVar[bool] = False
    # `check_beside` is to be called.
    beside: ClassVar[bool] = False

    # --- what is stored

    def from_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that options of this kind say. Raises ConfigurationError for one that says nothing."""
        found = {}
        for each in self.options:
            if each.option.name in given:
                value = given[each.option.name]
                if each.one:
                    if len(value) > 1:
                        raise ConfigurationError(f"--kind {self.name} takes one --{each.option.name.replace('_', '-')}")
                    value = value[0]
                elif isinstance(value, tuple):
                    value = list(value)
                found[each.setting or each.option.name] = value if each.read is None else each.read(value)
        return found

    def check_secret(self, secret: bytes | None) -> None:
        """Raise ConfigurationError unless the kind has such a secret, and it cannot be guessed."""
        if (secret is not None) != (self.secret is not Secret.NONE):
            raise ConfigurationError(f"kind {self.name} has {'no' if secret is not None else 'a'} secret")
        # AWS's own secret keys have 40 characters.
        if secret is not None and len(secret.partition(b"\n")[0]) < MIN_TOKEN_LENGTH:
            raise ConfigurationError(
                f"a secret of kind {self.name} has at least {MIN_TOKEN_LENGTH} characters: a "
                "shorter one could be guessed"
            )

    def check_beside(self, read: SettingsT, secret: bytes, others: Iterable[Other]) -> None:
        """Raise ConfigurationError where a new credential would weaken another one of its destination."""

    def normalise(self, read: SettingsT) -> SettingsT:
        """The settings as they are stored, and compared with requests. Raises ConfigurationError."""
        return read

    @abstractmethod
    def make(self, read: SettingsT, stored: Stored) -> CredentialT:
        """What requests are judged by. Raises ConfigurationError for settings that make none."""

    # --- what is verified

    def held(self, destination: Destination) -> list[CredentialT]:
        """The destination's credentials of this kind, live or not."""
        return [each for each in destination.credentials if isinstance(each, self.credential)]  # type: ignore[misc]  # C

    @abstractmethod
    def claims(self, head: Head, destination: Destination, now: datetime) -> bool:
        """Whether the head presents something in this kind's name.

        It is asked only where the destination requires the kind or holds a live credential of it.
        """

    def screen(self, head: Head, destination: Destination, now: datetime) -> None:
        """Judge what it claims as far as the head tells, before the body is read. Raises as `verify`.

        It is asked only where `by_head` is not set.
        """

    @abstractmethod
    def verify(self, inbound: Inbound, destination: Destination, now: datetime) -> Verified:
        """Judge what it claims for good, naming the credentials that matched; with `by_head` the body is empty.

        Raises Unverified with one of `reasons`.
        """


class HeadKind(Kind[SettingsT, CredentialT]):
    """A kind that the head alone decides."""

    by_head = True

    @abstractmethod
    def judge(self, head: Head, destination: Destination, now: datetime) -> int:
        """The id of the one credential that matched. Raises Unverified with one of `reasons`."""

    def verify(self, inbound: Inbound, destination: Destination, now: datetime) -> Verified:
        """The one credential that matched. Raises Unverified: see `judge`."""
        return Verified(credentials=(self.judge(inbound.head, destination, now),), kinds=frozenset({self.name}))
