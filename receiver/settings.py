"""One typed table of the RECEIVER_* variables (and DATABASE_URL): parsing, help, masking and `.env.example` come from it.

Every mistake is reported at once. The environment is the one truth: the command line writes its options there, so that
every process that it starts reads the same. May not open anything but the named .env file.
"""

from __future__ import annotations

import os
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from receiver.errors import ConfigurationError

PREFIX: Final = "RECEIVER_"

MIB: Final = 1024 * 1024


def _bind(value: str) -> str:
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError("write HOST:PORT, such as 127.0.0.1:8080")
    return value


def _comma_list(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _network(value: str) -> str:
    ip_network(value, strict=False)  # raises ValueError, which says what is wrong
    return value


Bind = Annotated[str, AfterValidator(_bind)]
CommaList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_comma_list)]
Networks = Annotated[tuple[Annotated[str, AfterValidator(_network)], ...], NoDecode, BeforeValidator(_comma_list)]


def _default_data_dir() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "redox-receiver"


class Settings(BaseSettings):
    """The settings of every process. Each field's description stands in `.env.example` and in `--help`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True, hide_input_in_errors=True,
                                      populate_by_name=True)

    database_url: SecretStr | None = Field(
        default=None, validation_alias="DATABASE_URL",
        description="PostgreSQL 14 or later, as postgresql://USER:PASSWORD@HOST/NAME. Unset: PostgreSQL from the "
                    "extra `embedded`, in the data directory.")
    data_dir: Path = Field(default_factory=_default_data_dir,
                           description="Where the keyring, the .env file and the embedded database live.")
    keyring: Path | None = Field(default=None, description="The keyring file (0600). Unset: keyring.json in the data directory.")
    bind: Bind = Field(default="127.0.0.1:8080", description="The public listener: destinations, nothing else.")
    admin_bind: Bind = Field(default="127.0.0.1:8081", description="The admin listener: keep it on loopback.")
    receivers: int = Field(default=2, ge=1, le=64, description="Receiver processes (gunicorn workers).")
    threads: int = Field(default=16, ge=2, le=256, description="Request threads of each receiver process.")
    workers: int = Field(default=1, ge=0, le=64, description="Delivery workers that `up` starts.")
    concurrency: int = Field(default=4, ge=1, le=64, description="Handler processes of each delivery worker.")
    responders: int = Field(default=2, ge=1, le=64,
                            description="Handler processes of each receiver process, for queries and after_handling; "
                                        "at most half of its threads wait for them.")
    max_body: int = Field(default=40 * MIB, ge=1024, le=512 * MIB,
                          description="Bytes of the largest body taken (Redox sends up to 40 MB).")
    quarantine_quota: int = Field(default=1024 * MIB, ge=MIB,
                                  description="Bytes of quarantined bodies a destination may hold; beyond it, 503.")
    trusted_proxies: Networks = Field(default=(), description="Addresses of proxies whose X-Forwarded-For is believed.")
    handlers: CommaList = Field(default=(),
                                description="Modules with handlers while developing; bound to development destinations.")
    handler_memory: int = Field(default=2048 * MIB, ge=128 * MIB,
                                description="Bytes of data a handler process may allocate.")
    lease: float = Field(default=30.0, ge=5, le=600,
                         description="Seconds after which the lanes of a worker that fell silent are taken over.")
    pause_after_dead: int = Field(default=25, ge=1,
                                  description="Dead deliveries of one error class within ten minutes that pause a handler.")
    postgres_account: str | None = Field(
        default=None, description="Account that runs the embedded PostgreSQL when started as root. "
                                  "Unset: postgres if there is one, else nobody.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least severe log line.")

    @model_validator(mode="after")
    def _responders_fit(self) -> Self:
        if self.responders > self.threads // 2:
            raise ValueError(f"{PREFIX}RESPONDERS: at most half of {PREFIX}THREADS")
        return self

    @property
    def keyring_path(self) -> Path:
        """Where the keyring is."""
        return self.keyring or self.data_dir / "keyring.json"


def load(env: dict[str, str] | None = None) -> Settings:
    """The settings from the environment (or `env`), and below it from the .env file.

    The file is RECEIVER_ENV_FILE, or `.env` in the data directory; never one in the directory where one happens to
    stand. Raises ConfigurationError with every mistake, each on a line with its variable.
    """
    environment = os.environ if env is None else env
    named = environment.get(f"{PREFIX}ENV_FILE")
    if named and not Path(named).is_file():
        raise ConfigurationError(f"{PREFIX}ENV_FILE: there is no file {named}")
    data_dir = Path(environment.get(f"{PREFIX}DATA_DIR") or _default_data_dir())
    try:
        return Settings(_env_file=named or data_dir / ".env", **({} if env is None else _given(env)))
    except ValidationError as exc:
        raise ConfigurationError("\n".join(_mistake(error) for error in exc.errors(include_input=False))) from None


def _given(env: dict[str, str]) -> dict[str, Any]:
    return {name: env[variable(name)] for name in Settings.model_fields if variable(name) in env}


def variable(field: str) -> str:
    """The environment variable of a field of Settings."""
    alias = Settings.model_fields[field].validation_alias
    return alias if isinstance(alias, str) else f"{PREFIX}{field.upper()}"


def _mistake(error: Any) -> str:
    text = error["msg"].removeprefix("Value error, ")
    return f"{variable(error['loc'][0])}: {text}" if error["loc"] else text
