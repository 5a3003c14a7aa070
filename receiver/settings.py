"""The settings: one typed table of the RECEIVER_* variables and DATABASE_URL, with parsing and help.

All mistakes are reported at once. The command line writes its options into the environment, so that every process that
it starts has the same settings. Must not open a file but the .env file.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from receiver.errors import ConfigurationError
from receiver.fault_injection import faults

PREFIX: Final = "RECEIVER_"
# Read before the table, because it names a file with more settings.
ENV_FILE: Final = f"{PREFIX}ENV_FILE"

# A line of a .env file that sets a variable: its name, and how its value begins.
ASSIGNED: Final = re.compile(r"^[ \t]*(?:export[ \t]+)?(\w+)[ \t]*=[ \t]*(\S?)", re.MULTILINE)

MIB: Final = 1024 * 1024


def _bind(value: str) -> str:
    host, colon, port = value.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError("write HOST:PORT, such as 127.0.0.1:8080")
    return value


def _comma_list(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _network(value: str) -> str:
    ip_network(value, strict=False)  # raises ValueError, which says what is wrong
    return value


Bind = Annotated[str, AfterValidator(_bind)]
Place = Annotated[Path, AfterValidator(Path.expanduser)]
CommaList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_comma_list)]
Networks = Annotated[tuple[Annotated[str, AfterValidator(_network)], ...], NoDecode, BeforeValidator(_comma_list)]


def _default_data_dir() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "redox-receiver"


class Settings(BaseSettings):
    """The settings of every process. The descriptions are shown in `.env.example` and `--help`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        env_ignore_empty=True,
        env_file_encoding="utf-8",
        populate_by_name=True,
    )

    database_url: SecretStr | None = Field(
        default=None,
        validation_alias="DATABASE_URL",
        description="PostgreSQL 14 or later, as postgresql://USER:PASSWORD@HOST/NAME. Unset: PostgreSQL from the "
        "extra `embedded`, in the data directory.",
    )
    data_dir: Place = Field(
        default_factory=_default_data_dir,
        description="Where the keyring, the .env file and the embedded database live. Unset: redox-receiver in "
        "XDG_DATA_HOME, or in ~/.local/share.",
    )
    keyring: Place | None = Field(
        default=None, description="The keyring file (0600). Unset: keyring.json in the data directory."
    )
    bind: Bind = Field(default="127.0.0.1:8080", description="The public listener: destinations, nothing else.")
    admin_bind: Bind = Field(default="127.0.0.1:8081", description="The admin listener: keep it on loopback.")
    server_mode: Literal["flask", "asgi"] = Field(
        default="flask",
        validation_alias=AliasChoices(f"{PREFIX}SERVER_MODE", f"{PREFIX}DOOR"),
        description="How the event loop serves destinations and the token endpoint: through Flask (flask), or "
        "without it (asgi).",
    )
    receivers: int = Field(default=2, ge=1, le=64, description="Receiver processes (gunicorn workers).")
    threads: int = Field(
        default=16,
        ge=2,
        le=256,
        description="Request threads of each receiver process: for large bodies, and for requests that wait for a "
        "handler.",
    )
    workers: int = Field(default=1, ge=0, le=64, description="Delivery workers that `up` starts.")
    concurrency: int = Field(default=4, ge=1, le=64, description="Handler processes of each delivery worker.")
    responders: int = Field(
        default=2,
        ge=1,
        le=64,
        validate_default=True,
        description="Handler processes of each receiver process, for queries and after_handling; at most half of its "
        "threads wait for them.",
    )
    max_body: int = Field(
        default=40 * MIB,
        ge=1024,
        le=512 * MIB,
        description="Bytes of the largest accepted body (Redox sends up to 40 MB).",
    )
    quarantine_quota: int = Field(
        default=1024 * MIB, ge=MIB, description="Bytes of quarantined bodies a destination may hold; beyond it, 503."
    )
    trusted_proxies: Networks = Field(
        default=(), description="Addresses of proxies whose X-Forwarded-For is trusted, separated by commas."
    )
    key_set_refresh: int = Field(
        default=300,
        ge=1,
        le=86_400,
        description="Seconds after which the public keys of a --jwks-url are fetched again.",
    )
    redox_rate: int = Field(
        default=7_500, ge=1, description="Requests a process sends to Redox in five minutes: Redox counts by address."
    )
    handlers: CommaList = Field(
        default=(),
        description="Modules with handlers while developing, separated by commas; bound to development destinations.",
    )
    handler_memory: int = Field(
        default=2048 * MIB, ge=128 * MIB, description="Bytes of data a handler process may allocate."
    )
    lease: float = Field(
        default=30.0,
        ge=5,
        le=600,
        description="Seconds after which other workers take over the lanes of a worker that has fallen silent.",
    )
    pause_after_dead: int = Field(
        default=25, ge=1, description="Dead deliveries of one error class within ten minutes that pause a handler."
    )
    notify_url: SecretStr | None = Field(
        default=None,
        description="Where the admin listener posts a notice of each finding that lasts, signed as Standard Webhooks "
        "says. Needs the secret below.",
    )
    notify_secret: SecretStr | None = Field(
        default=None,
        validate_default=True,
        description="The secret of that signature: whsec_ and base64 of 24 to 64 random bytes.",
    )
    notify_command: str | None = Field(
        default=None,
        description="A command, run without a shell, that reads each notice on stdin as a mail, such as "
        "`sendmail ops@example.org`.",
    )
    notify_repeat: int = Field(
        default=14_400, ge=300, description="Seconds after which a finding that lasts is notified again."
    )
    postgres_account: str | None = Field(
        default=None,
        description="Account that runs the embedded PostgreSQL when started as root. "
        "Unset: postgres if it exists, else nobody, which other programs also use.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe log line: debug, info, warning or error."
    )
    failpoints: str | None = Field(
        default=None,
        description="Fault injection, for tests of this program only (receiver/fault_injection/faults.py). Read only "
        "from the environment, and refused where a production destination is registered.",
    )

    @field_validator("responders")
    @classmethod
    def _leave_threads(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("threads", 2 * value) // 2:
            raise ValueError(f"at most half of {PREFIX}THREADS")
        return value

    @field_validator("notify_secret")
    @classmethod
    def _need_secret(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is None and info.data.get("notify_url") is not None:
            raise ValueError(f"needed where {PREFIX}NOTIFY_URL is set")
        return value

    @field_validator("failpoints")
    @classmethod
    def _read_failpoints(cls, value: str | None) -> str | None:
        try:
            faults.parse(value or "")
        except ConfigurationError as exc:
            raise ValueError(str(exc)) from None
        return value

    @property
    def keyring_path(self) -> Path:
        """The path of the keyring."""
        return self.keyring or self.data_dir / "keyring.json"


def env_file(environment: Mapping[str, str]) -> Path:
    """The path of the .env file: RECEIVER_ENV_FILE, or `.env` in the data directory; never the current directory's.

    Raises ConfigurationError if the named file does not exist.
    """
    named = environment.get(ENV_FILE)
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise ConfigurationError(f"{ENV_FILE}: there is no file {path}")
        return path
    data_dir = environment.get(variable("data_dir"))
    return (Path(data_dir).expanduser() if data_dir else _default_data_dir()) / ".env"


def load_settings() -> Settings:
    """Load the settings from the environment, which takes precedence, and from the .env file (`env_file`).

    Raises ConfigurationError with all mistakes, each on a line with its variable.
    """
    file = env_file(os.environ)
    _check_readers(file)
    try:
        settings = Settings(_env_file=file)
    except ValidationError as exc:
        raise ConfigurationError("\n".join(_mistake(error) for error in exc.errors(include_input=False))) from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{file} is not UTF-8 text: write it again, .env.example shows how") from None
    except OSError as exc:
        raise ConfigurationError(f"{file} cannot be read ({exc.strerror})") from None
    if settings.failpoints and not os.environ.get(faults.VARIABLE):
        # In a file it would be forgotten and apply to every process.
        raise ConfigurationError(f"{faults.VARIABLE} stands in {file}: it is read from the environment alone")
    return settings


def _check_readers(file: Path) -> None:
    """Raise ConfigurationError if the file has secrets and other accounts can read it.

    Secrets are DATABASE_URL, which has a password, and every variable without our prefix: the settings of plugins.
    """
    try:
        mode, text = stat.S_IMODE(file.stat().st_mode), file.read_text()
    except (OSError, UnicodeDecodeError):
        return  # it does not exist, or loading it reports the error
    if mode & 0o077 and any(value and not name.upper().startswith(PREFIX) for name, value in ASSIGNED.findall(text)):
        raise ConfigurationError(f"{file} holds secrets and can be read by others: run `chmod 600 {file}`")


def variable(field: str) -> str:
    """The environment variable of a field of Settings."""
    return names_of(field)[0]


def names_of(field: str) -> list[str]:
    """The environment variable of a field, and its other names."""
    alias = Settings.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        return [str(choice) for choice in alias.choices]
    return [alias if isinstance(alias, str) else f"{PREFIX}{field.upper()}"]


def _mistake(error: Any) -> str:
    named = error["loc"][0]
    text = error["msg"].removeprefix("Value error, ")
    return f"{variable(named) if named in Settings.model_fields else named}: {text}"
