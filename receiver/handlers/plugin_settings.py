"""Fills a plugin's own settings from PLUGIN_<NAME>_* variables.

May not print a value: mistakes name their variables alone.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from receiver.errors import ConfigurationError

Model = TypeVar("Model", bound=BaseModel)


def load(model: type[Model], handler: str, env_file: Path | None) -> Model:
    """An instance of `model` from the environment, and below it from the .env file. Raises ConfigurationError."""
    prefix = f"PLUGIN_{handler.upper().replace('-', '_')}_"
    reading: Any = _reading(model)
    try:
        filled: Model = reading(_env_prefix=prefix, _env_file=env_file)
    except ValidationError as exc:
        raise ConfigurationError("\n".join(
            f"{prefix}{'__'.join(map(str, error['loc'])).upper()}: {error['msg']}"
            for error in exc.errors(include_input=False, include_context=False))) from None
    return filled


@cache
def _reading(model: type[BaseModel]) -> type[BaseModel]:
    """The model as one that reads the environment; whoever wrote it need not know pydantic-settings."""
    if issubclass(model, BaseSettings):
        return model
    return type(model.__name__, (model, BaseSettings), {
        "__module__": model.__module__,
        "model_config": SettingsConfigDict(extra="ignore", hide_input_in_errors=True)})
