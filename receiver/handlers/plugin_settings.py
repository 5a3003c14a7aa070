"""Fills a plugin's own settings from PLUGIN_<NAME>_* variables.

Must not print a value: mistakes name their variables alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from receiver.errors import ConfigurationError

_FIELD: Final = re.compile(r'for field "([^"]+)"')
_PLUGINS_OWN: Final = frozenset({"value_error", "assertion_error"})

Model = TypeVar("Model", bound=BaseModel)


def load_plugin_settings(model: type[Model], handler: str, env_file: Path | None) -> Model:
    """An instance of `model` from the environment, and below it from the .env file. Raises ConfigurationError."""
    prefix = f"PLUGIN_{handler.upper().replace('-', '_')}_"
    reading: Any = _reading(model)
    try:
        filled: Model = reading(_env_prefix=prefix, _env_file=env_file)
    except ValidationError as exc:
        names = _variables(reading, prefix)
        raise ConfigurationError(
            "\n".join(_mistake(error, names) for error in exc.errors(include_input=False, include_context=False))
        ) from None
    except SettingsError as exc:  # a variable that holds no JSON, where the field is a list or a model
        field = _FIELD.search(str(exc))
        raise ConfigurationError(
            f"{_variables(reading, prefix).get(field[1], prefix) if field else prefix}: write the value as JSON"
        ) from None
    return filled


def _variables(reading: type[BaseSettings], prefix: str) -> dict[str, str]:
    """What pydantic calls a field in its errors → the variable that fills it: without the prefix where it has an alias."""
    read = EnvSettingsSource(reading, env_prefix=prefix)._extract_field_info  # the one place that knows
    return {
        each: variable.upper()
        for name, field in reading.model_fields.items()
        for key, variable, _ in read(field, name)
        for each in (key, name)
    }


def _mistake(error: ErrorDetails, names: Mapping[str, str]) -> str:
    """The variable, what in its value is wrong, and why. A validator of the plugin's may quote the value."""
    field, *inside = map(str, error["loc"]) if error["loc"] else ("",)
    message = "the plugin's own check refuses the value" if error["type"] in _PLUGINS_OWN else error["msg"]
    within = f" (in {'.'.join(inside)})" if inside else ""
    return f"{names.get(field, field) or 'the settings together'}{within}: {message}"


@cache
def _reading(model: type[BaseModel]) -> type[BaseModel]:
    """The model as one that reads the environment; whoever wrote it need not know pydantic-settings."""
    if issubclass(model, BaseSettings):
        return model
    return type(
        model.__name__,
        (model, BaseSettings),
        {"__module__": model.__module__, "model_config": SettingsConfigDict(extra="ignore", hide_input_in_errors=True)},
    )
