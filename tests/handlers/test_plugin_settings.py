"""A plugin's own settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings

from receiver.errors import ConfigurationError
from receiver.handlers.plugin_settings import load_plugin_settings


class Beds(BaseModel):
    """A plugin's model without settings of its own."""

    url: str
    limit: int = 3
    key: SecretStr | None = None


class Wards(BaseSettings):
    """A plugin's model with settings of its own."""

    url: str


def test_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """PLUGIN_<NAME>_* fill the model: the handler's name in capitals, with _ for -.

    Fields with defaults are optional.
    """
    monkeypatch.setenv("PLUGIN_BED_BOARD_URL", "http://beds")
    monkeypatch.setenv("PLUGIN_BED_BOARD_KEY", "k")
    monkeypatch.setenv("URL", "of somebody else")
    filled = load_plugin_settings(Beds, "bed-board", None)

    assert isinstance(filled, Beds)
    assert (filled.url, filled.limit, filled.key) == ("http://beds", 3, SecretStr("k"))
    assert load_plugin_settings(Wards, "bed-board", None).url == "http://beds"


def test_below_it_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A variable that is not in the environment is read from the .env file."""
    (tmp_path / ".env").write_text("PLUGIN_BEDS_URL=http://file\nPLUGIN_BEDS_LIMIT=5\nRECEIVER_BIND=x:1\n")
    monkeypatch.setenv("PLUGIN_BEDS_URL", "http://environment")

    assert load_plugin_settings(Beds, "beds", tmp_path / ".env") == load_plugin_settings(
        Beds, "beds", tmp_path / ".env"
    )
    assert (
        load_plugin_settings(Beds, "beds", tmp_path / ".env").url,
        load_plugin_settings(Beds, "beds", tmp_path / ".env").limit,
    ) == ("http://environment", 5)


class Board(BaseModel):
    """A nested model."""

    size: int


class Clinic(BaseModel):
    """With an alias, a nested model, and a validator of its own."""

    url: str = Field(validation_alias="CLINIC_URL")
    board: Board
    beds: list[int] = []
    key: str = "k"

    @field_validator("key")
    @classmethod
    def careless(cls, value: str) -> str:
        """Raise an error that quotes the value."""
        if len(value) > 3:
            raise ValueError(f"{value} is too long")
        return value


def test_mistakes_name_the_variable_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """An alias has no prefix; a nested model is named by the variable that holds it as JSON; a validator's text about a
    value is not shown.
    """
    monkeypatch.setenv("PLUGIN_CLINIC_BOARD", '{"size": "hunter2"}')
    monkeypatch.setenv("PLUGIN_CLINIC_KEY", "hunter2")
    with pytest.raises(ConfigurationError) as caught:
        load_plugin_settings(Clinic, "clinic", None)
    assert sorted(line.partition(":")[0] for line in str(caught.value).splitlines()) == [
        "CLINIC_URL",
        "PLUGIN_CLINIC_BOARD (in size)",
        "PLUGIN_CLINIC_KEY",
    ]
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("PLUGIN_CLINIC_BEDS", "hunter2")
    with pytest.raises(ConfigurationError, match=r"^PLUGIN_CLINIC_BEDS: write the value as JSON$"):
        load_plugin_settings(Clinic, "clinic", None)


def test_mistakes_name_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every missing or invalid variable is named, without its value."""
    monkeypatch.setenv("PLUGIN_BEDS_LIMIT", "hunter2")
    with pytest.raises(ConfigurationError) as caught:
        load_plugin_settings(Beds, "beds", None)

    assert sorted(line.partition(":")[0] for line in str(caught.value).splitlines()) == [
        "PLUGIN_BEDS_LIMIT",
        "PLUGIN_BEDS_URL",
    ]
    assert "hunter2" not in str(caught.value)
