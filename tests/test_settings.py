"""Settings: one table, every mistake at once, nothing read from where one happens to stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from receiver.errors import ConfigurationError
from receiver.settings import MIB, Settings, env_file, load_settings, variable
from receiver.settings_variables import render_example, unread

ROOT = Path(__file__).resolve().parents[1]


def test_every_setting_has_a_default() -> None:
    """Nothing has to be set: the embedded database and loopback listeners are what there is without."""
    settings = load_settings()
    assert settings.database_url is None
    assert (settings.bind, settings.admin_bind, settings.max_body) == ("127.0.0.1:8080", "127.0.0.1:8081", 40 * MIB)
    assert settings.keyring_path == settings.data_dir / "keyring.json"


def test_the_data_directory_follows_xdg_and_else_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XDG_DATA_HOME where it is set, else ~/.local/share."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert load_settings().data_dir == tmp_path / "redox-receiver"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_settings().data_dir == tmp_path / ".local" / "share" / "redox-receiver"


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No shell expands it in a .env file or a unit file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RECEIVER_DATA_DIR", "~/data")
    monkeypatch.setenv("RECEIVER_KEYRING", "~/keys.json")
    settings = load_settings()
    assert (settings.data_dir, settings.keyring_path) == (tmp_path / "data", tmp_path / "keys.json")
    (tmp_path / "named").write_text("RECEIVER_THREADS=8\n")
    monkeypatch.setenv("RECEIVER_ENV_FILE", "~/named")
    assert load_settings().threads == 8


def test_every_mistake_is_told_at_once_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """One start reports all mistakes."""
    mistakes = {
        "BIND": "8080",
        "ADMIN_BIND": "localhost:99999",
        "THREADS": "many",
        "WORKERS": "-1",
        "MAX_BODY": "1",
        "TRUSTED_PROXIES": "10.0.0.0/8,nowhere",
        "LOG_LEVEL": "loud",
    }
    for name, value in mistakes.items():
        monkeypatch.setenv(f"RECEIVER_{name}", value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    message = str(caught.value).splitlines()
    assert sorted(line.partition(":")[0] for line in message) == sorted(f"RECEIVER_{name}" for name in mistakes)
    assert "RECEIVER_BIND: write HOST:PORT, such as 127.0.0.1:8080" in message


def test_a_number_that_is_out_of_bounds_is_told_with_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator learns what would do."""
    monkeypatch.setenv("RECEIVER_THREADS", "257")
    with pytest.raises(ConfigurationError, match="RECEIVER_THREADS: Input should be less than or equal to 256"):
        load_settings()


@pytest.mark.parametrize(
    ("threads", "responders", "fits"),
    [("4", None, True), ("4", "2", True), ("4", "3", False), ("2", None, False), ("3", "1", True)],
)
def test_responders_take_at_most_half_of_the_threads(
    monkeypatch: pytest.MonkeyPatch, threads: str, responders: str | None, fits: bool
) -> None:
    """Slow responders must not stop feeds, be it by a default."""
    monkeypatch.setenv("RECEIVER_THREADS", threads)
    if responders is not None:
        monkeypatch.setenv("RECEIVER_RESPONDERS", responders)
    if fits:
        assert load_settings().threads == int(threads)
    else:
        with pytest.raises(ConfigurationError, match=r"^RECEIVER_RESPONDERS: at most half of RECEIVER_THREADS$"):
            load_settings()


def test_the_environment_goes_before_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment takes precedence over .env, and .env over the default."""
    (tmp_path / ".env").write_text("RECEIVER_THREADS=8\nRECEIVER_WORKERS=3\nDATABASE_URL=postgresql://a/b\n")
    (tmp_path / ".env").chmod(0o600)
    monkeypatch.setenv("RECEIVER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("RECEIVER_THREADS", "10")
    settings = load_settings()
    assert (settings.threads, settings.workers, settings.concurrency) == (10, 3, 4)
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == "postgresql://a/b"


def test_no_file_is_read_from_where_one_happens_to_stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A .env in the working directory may be anybody's."""
    (tmp_path / ".env").write_text("RECEIVER_THREADS=8\n")
    monkeypatch.chdir(tmp_path)
    assert load_settings().threads == 16


def test_a_named_file_goes_before_the_data_directorys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One file is read, and the named one may say where the data directory is."""
    (tmp_path / ".env").write_text("RECEIVER_WORKERS=3\n")
    (tmp_path / "named").write_text(f"RECEIVER_THREADS=8\nRECEIVER_DATA_DIR={tmp_path / 'elsewhere'}\n")
    monkeypatch.setenv("RECEIVER_ENV_FILE", str(tmp_path / "named"))
    settings = load_settings()
    assert (settings.threads, settings.workers, settings.data_dir) == (8, 1, tmp_path / "elsewhere")


def test_a_named_file_that_is_missing_is_a_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Silently starting without it would start something else."""
    monkeypatch.setenv("RECEIVER_ENV_FILE", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match="RECEIVER_ENV_FILE: there is no file"):
        load_settings()


def test_a_file_that_cannot_be_read_is_told_without_its_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A secret may stand in it."""
    (tmp_path / ".env").write_bytes(b"DATABASE_URL=postgresql://canary\xff\n")
    monkeypatch.setenv("RECEIVER_DATA_DIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match="is not UTF-8 text") as caught:
        load_settings()
    assert "canary" not in str(caught.value)


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As deployments write it that leave a setting open."""
    (tmp_path / ".env").write_text("RECEIVER_KEYRING=\nRECEIVER_BIND=\n")
    monkeypatch.setenv("RECEIVER_DATA_DIR", str(tmp_path))
    for name in ("DATABASE_URL", "RECEIVER_HANDLERS", "RECEIVER_ENV_FILE", "RECEIVER_THREADS"):
        monkeypatch.setenv(name, "")
    settings = load_settings()
    assert settings.database_url is None
    assert (settings.keyring, settings.bind, settings.handlers, settings.threads) == (None, "127.0.0.1:8080", (), 16)


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Space around a name and a comma too many do no harm."""
    monkeypatch.setenv("RECEIVER_HANDLERS", "one, two.three,,")
    monkeypatch.setenv("RECEIVER_TRUSTED_PROXIES", "10.0.0.0/8, ::1")
    settings = load_settings()
    assert (settings.handlers, settings.trusted_proxies) == (("one", "two.three"), ("10.0.0.0/8", "::1"))


def test_the_databases_password_is_in_no_repr_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed settings do not show the password of the database."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:canary@host/name")
    assert "canary" not in repr(load_settings()) + str(load_settings())
    monkeypatch.setenv("RECEIVER_THREADS", "canary")
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert "canary" not in str(caught.value)


def test_settings_do_not_change() -> None:
    """What one part of a process reads, every part reads."""
    with pytest.raises(ValueError, match="frozen"):
        load_settings().threads = 3  # type: ignore[misc]  # the fact under test


def test_a_misspelled_variable_is_found() -> None:
    """A variable with our prefix that is not a setting is found; variables of other programs are not."""
    assert unread(
        [
            "RECEIVER_THREDS",
            "RECEIVER_THREADS",
            "RECEIVER_ENV_FILE",
            "DATABASE_URL",
            "HOME",
            "PLUGIN_X_Y",
            "receiver_bind",
            "receiver_bnd",
        ]
    ) == ["RECEIVER_THREDS", "receiver_bnd"]


def test_every_variable_is_one_that_is_read() -> None:
    """`unread` and the table agree, for the lower-case names too that are read."""
    assert unread(variable(name) for name in Settings.model_fields) == []


def test_the_env_file_is_named_or_the_data_directorys(tmp_path: Path) -> None:
    """`env_file` returns the path that `load_settings` reads."""
    named = tmp_path / "named"
    named.touch()
    assert env_file({"RECEIVER_ENV_FILE": str(named), "RECEIVER_DATA_DIR": "/data"}) == named
    assert env_file({"RECEIVER_DATA_DIR": "/data"}) == Path("/data/.env")


def test_the_example_file_is_what_the_table_says() -> None:
    """`.env.example` names every variable with its default. Written by `render_example`."""
    assert (ROOT / ".env.example").read_text() == render_example()
    for name in Settings.model_fields:
        assert f"\n#{variable(name)}=" in render_example()


def test_the_example_file_is_read_as_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Uncommented as it is, it changes nothing."""
    expected = load_settings()
    lines = [
        line.removeprefix("#")
        for line in render_example().splitlines()
        if line.startswith("#") and "=" in line and not line.startswith("# ")
    ]
    assert len(lines) == len(Settings.model_fields)
    (tmp_path / "file").write_text("\n".join(lines))
    monkeypatch.setenv("RECEIVER_ENV_FILE", str(tmp_path / "file"))
    assert load_settings() == expected


@pytest.mark.parametrize(
    ("text", "mode", "refused"),
    [
        ("DATABASE_URL=postgresql://u:p@h/n\n", 0o640, True),
        ("export PLUGIN_X_KEY=secret\n", 0o604, True),
        ("DATABASE_URL=postgresql://u:p@h/n\n", 0o600, False),
        ("RECEIVER_THREADS=4\n# A=b\n", 0o644, False),
    ],
)
def test_an_env_file_with_secrets_that_others_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, mode: int, *, refused: bool
) -> None:
    """Refused as the keyring is, with the command that fixes it; without a secret in it, it may be read."""
    file = tmp_path / "file"
    file.write_text(text)
    file.chmod(mode)
    monkeypatch.setenv("RECEIVER_ENV_FILE", str(file))
    if refused:
        with pytest.raises(ConfigurationError, match=f"chmod 600 {file}"):
            load_settings()
    else:
        load_settings()


@pytest.mark.parametrize("name", ["RECEIVER_SERVER_MODE", "RECEIVER_DOOR"])
def test_the_server_mode_has_two_names(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Either name of the variable is read, and neither is taken for a misspelling."""
    monkeypatch.setenv(name, "asgi")
    assert load_settings().server_mode == "asgi"
    assert unread([name]) == []
