"""`simulate --api`: the Redox API that `simulate` serves during a feed."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from receiver.cli.simulated_api import serve_api
from tests.cli.conftest import Commands
from tests.outbound.conftest import PRIVATE
from tests.support.machine import SOURCE
from tests.support.ports import free_port


def test_it_knows_the_keys_that_are_for_its_address(run: Commands, tmp_path: Path) -> None:
    """It accepts the OAuth keys and legacy keys whose base URL is its address, and no others."""
    address = f"127.0.0.1:{free_port()}"
    host, _, port = address.rpartition(":")
    (tmp_path / "key.pem").write_bytes(PRIVATE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    common = ("--environment", "development", "--base-url", f"http://{address}")
    run(
        "outbound",
        "key",
        "add",
        "own",
        *common,
        "--client-id",
        "c",
        "--private-key",
        str(tmp_path / "key.pem"),
        "--kid",
        "k",
    )
    run("outbound", "key", "add", "old", *common, "--legacy-file", "-", stdin='{"apiKey": "a", "secret": "s"}')
    run("outbound", "key", "add", "else", *common[:2], "--legacy-file", "-", stdin='{"apiKey": "b", "secret": "s"}')
    with serve_api((host, int(port)), "http://127.0.0.1:9", "lab", 1.0) as came:
        assert {run.json("outbound", "token", "--key", name)["api_key"] for name in ("own", "old")} == {"own", "old"}
        run(
            "outbound",
            "key",
            "add",
            "else",
            *common,
            "--legacy-file",
            "-",
            "--replace",
            stdin='{"apiKey": "b", "secret": "s"}',
        )
        assert "legacy" in run.fails("outbound", "token", "--key", "else")
        assert came() == {}


def test_the_port_may_be_in_use(run: Commands, tmp_path: Path) -> None:
    """A port in use is refused, and the error names --api."""
    run("destination", "add", "lab", "--token-out", str(tmp_path / "token"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        printed = run.fails(
            "simulate",
            "--url",
            "http://127.0.0.1:9",
            "--destination",
            "lab",
            "--token-file",
            str(tmp_path / "token"),
            "--source",
            SOURCE,
            "--api",
            f"127.0.0.1:{listener.getsockname()[1]}",
        )
    assert "choose another with --api" in printed


@pytest.mark.parametrize(
    ("api", "status", "says"),
    [
        ("0.0.0.0:8090", 2, "not a loopback address"),
        ("8090", 2, "HOST:PORT"),
        ("127.0.0.1:x", 2, "HOST:PORT"),
        (None, 1, "outbound key add"),
    ],
)
def test_invalid_api_address_or_keys(run: Commands, tmp_path: Path, api: str | None, status: int, says: str) -> None:
    """Only a loopback address is accepted, and only with an API key for it."""
    run("destination", "add", "lab", "--token-out", str(tmp_path / "token"))
    assert says in run.fails(
        "simulate",
        "--url",
        "http://127.0.0.1:9",
        "--destination",
        "lab",
        "--token-file",
        str(tmp_path / "token"),
        "--source",
        SOURCE,
        "--api",
        api or f"127.0.0.1:{free_port()}",
        status=status,
    )
