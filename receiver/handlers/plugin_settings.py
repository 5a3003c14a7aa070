"""Plugin settings: fills a plugin's pydantic model from PLUGIN_<NAME>_* variables.

Must not print a value: errors name only the variables.
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
    """Return an instance of `model`, filled from the environment and then from the .env file. Raises
    ConfigurationError.
    """
    prefix = f"PLUGIN_{handler.upper().replace('-', '_')}_"
    settings_class: Any = _settings_class(model)
    try:
        filled: Model = settings_class(_env_prefix=prefix, _env_file=env_file)
    except ValidationError as exc:
        names = _variables(settings_class, prefix)
        raise ConfigurationError(
            "\n".join(_describe_error(error, names) for error in exc.errors(include_input=False, include_context=False))
        ) from None
    except SettingsError as exc:  # the value is not valid JSON, and the field is a list or a model
        field = _FIELD.search(str(exc))
        raise ConfigurationError(
            f"{_variables(settings_class, prefix).get(field[1], prefix) if field else prefix}: write the value as JSON"
        ) from None
    return filled


def _variables(settings_class: type[BaseSettings], prefix: str) -> dict[str, str]:
    """Map pydantic's name of each field in errors to its variable, which has no prefix if the field has an alias."""
    read = EnvSettingsSource(
        settings_class, env_prefix=prefix
    )._extract_field_info  # the only function that has this information
    return {
        each: variable.upper()
        for name, field in settings_class.model_fields.items()
        for key, variable, _ in read(field, name)
        for each in (key, name)
    }


def _describe_error(error: ErrorDetails, names: Mapping[str, str]) -> str:
    """Return the error text: the variable, the place in its value, and the reason. A plugin's validator may quote the
    value.
    """
    field, *inside = map(str, error["loc"]) if error["loc"] else ("",)
    message = "the plugin's validator rejects the value" if error["type"] in _PLUGINS_OWN else error["msg"]
    within = f" (in {'.'.join(inside)})" if inside else ""
    return f"{names.get(field, field) or 'the settings together'}{within}: {message}"


@cache
def _settings_class(model: type[BaseModel]) -> type[BaseModel]:
    """Return the model as a class that reads the environment, so that plugins do not need pydantic-settings."""
    if issubclass(model, BaseSettings):
        return model
    return type(
        model.__name__,
        (model, BaseSettings),
        {"__module__": model.__module__, "model_config": SettingsConfigDict(extra="ignore", hide_input_in_errors=True)},
    )
