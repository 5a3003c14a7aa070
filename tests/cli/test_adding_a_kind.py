"""The steps of deploy/adding-a-credential-kind.md, followed exactly in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from receiver.findings import feeds
from receiver.protocol.tokens import DENIAL_REASONS
from receiver.protocol.verification import KINDS, reason_meanings
from receiver.protocol.verification.kind import SecretStorage
from receiver.simulator.client_auth_file import FILES
from tests.storage.conftest import door, ledger, open_ledger
from tests.storage.door import Door

__all__ = ["door", "ledger", "open_ledger"]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "deploy" / "adding-a-credential-kind.md").read_text()
AUTHENTICATION = (ROOT / "deploy" / "authentication.md").read_text()

# Verifies a request for each argument with the registry of the database. Prints its credentials, or the reason.
VERIFY = """
import sys
from datetime import UTC, datetime
from receiver import keyring
from receiver.database.engine import open_engine
from receiver.errors import Unverified
from receiver.protocol import verification
from receiver.protocol.message import Head, Inbound
from receiver.settings import load_settings
from receiver.storage.registry import loader

settings, now = load_settings(), datetime.now(UTC)
with open_engine(settings.database_url.get_secret_value(), pooled=False).connect() as connection:
    at = loader.load_registry(connection, keyring.load_keyring(settings.keyring_path)).destinations["clinic"]
for value in sys.argv[1:]:
    head = Head(destination="clinic", method="POST", headers={"x-agreed": value}, target="/redox/clinic", query="",
                peer="192.0.2.1", received_at=now)
    try:
        proof = verification.check_head(head, at, now)
        print(proof.complete(Inbound(head=head, body=b"{}"), at, now).credentials)
    except Unverified as exc:
        print(exc.reason, "=", verification.reason_meanings()[exc.reason])
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package with the kind of the page: its file, and its entry in KINDS."""
    copy = tmp_path / "copy"
    for name in ("receiver", "migrations"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (code,) = re.findall(r"^   ```python\n(.*?)^   ```$", PAGE, re.DOTALL | re.MULTILINE)
    kinds = copy / "receiver" / "protocol" / "verification"
    (kinds / "pin.py").write_text(textwrap.dedent(code))
    table = kinds / "__init__.py"
    text = table.read_text().replace("MtlsKind())", "MtlsKind(), PinKind())")
    text = text.replace("\n\n__all__", "\nfrom receiver.protocol.verification.pin import PinKind\n\n__all__", 1)
    table.write_text(text)
    return copy


class ChangedPackage:
    """Runs the changed package in processes of its own."""

    def __init__(self, package: Path, database_url: str, keyring_path: Path, data_dir: Path) -> None:
        self._package = package
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(package),
            "DATABASE_URL": database_url,
            "RECEIVER_KEYRING": str(keyring_path),
            "RECEIVER_DATA_DIR": str(data_dir),
        }

    def python(self, *arguments: str) -> str:
        """Run Python, which must exit with status 0. Returns its output."""
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self._package,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, *command: str) -> Any:
        """Run a command with --json. Returns the document."""
        return json.loads(self.python("-m", "receiver", *command, "--json"))


def test_a_kind_is_added_as_the_page_says(
    door: Door, package: Path, database_url: str, keyring_path: Path, tmp_path: Path
) -> None:
    """The file and the entry are enough for help, command line, storage, the registry file and verification."""
    changed = ChangedPackage(package, database_url, keyring_path, tmp_path / "data")
    text = " ".join(changed.python("-m", "receiver", "credential", "add", "--help").split())
    assert "pin: a fixed value in a header" in text
    assert "--pin-header TEXT pin: header with the value" in text
    added = changed.json("credential", "add", "clinic", "--kind", "pin", "--pin-header", "X-Agreed")
    assert added["settings"] == {"header": "x-agreed"}
    assert len(added["pin"]) > 40
    assert added["pin"] not in repr(door.rows("SELECT * FROM credentials"))
    changed.json("destination", "set", "clinic", "--require", "pin")
    right, wrong = changed.python("-c", VERIFY, added["pin"], "another").splitlines()
    assert right == f"({added['id']},)"
    assert wrong == "pin_wrong = the value is not one of this destination's"

    (tmp_path / "pin").write_text(added["pin"])
    (tmp_path / "token").write_text("another-made-up-token-0123456789abcdef")
    (tmp_path / "registry.toml").write_text(
        '[destinations.other]\nrequire = ["pin+token"]\n'
        'credentials = [{ kind = "token", file = "token" }, { kind = "pin", file = "pin", header = "x-agreed" }]\n'
    )
    assert "pin" in {each["name"] for each in changed.json("registry", "apply", str(tmp_path / "registry.toml"))}
    assert changed.json("registry", "apply", str(tmp_path / "registry.toml")) == []


def test_no_other_module_names_a_kind() -> None:
    """Storage and command line compare a kind only with `token`, which every new destination needs."""
    for path in (*(ROOT / "receiver" / "storage").rglob("*.py"), *(ROOT / "receiver" / "cli").rglob("*.py")):
        named = set(re.findall(r"(?:kind|KIND)\S* (?:==|!=|in) \(?[\"'](\w+)[\"']", path.read_text()))
        # API keys have kinds of their own, one of which is called oauth.
        assert not (named & set(KINDS)) - {"token", "oauth"}, path


def test_there_is_one_table_of_kinds() -> None:
    """KINDS is defined once. (The KINDS of receiver.samples are those of messages.)"""
    sources = {path.relative_to(ROOT / "receiver"): path.read_text() for path in (ROOT / "receiver").rglob("*.py")}
    found = {str(path) for path, text in sources.items() if re.search(r"^KINDS\b", text, re.MULTILINE)}
    assert found == {"protocol/verification/__init__.py", "samples/kinds.py"}


def test_each_kind_is_documented_and_simulated() -> None:
    """deploy/authentication.md has a command for each kind and each reason with its meaning; `simulate` presents it."""
    for name, kind in KINDS.items():
        assert f"--kind {name} " in AUTHENTICATION, name
        assert (kind.secret is SecretStorage.DIGESTED) == bool(kind.digest_label), name
    assert {"token", *FILES} == set(KINDS)
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", AUTHENTICATION, re.MULTILINE))
    assert rows == reason_meanings() | DENIAL_REASONS


def test_a_finding_explains_a_reason() -> None:
    """`status` explains a refusal with the text of the kind, or of the token endpoint."""
    for reason, text in (reason_meanings() | DENIAL_REASONS).items():
        meaning, fix = feeds._explain(reason, 401, "clinic")
        assert meaning == text
        assert "clinic" in fix


def test_digests_of_two_kinds_differ() -> None:
    """Each kind has its own label: equal secrets of two kinds have different digests."""
    labels = [kind.digest_label for kind in KINDS.values() if kind.digest_label]
    assert len(labels) == len(set(labels))
