"""Uploads of RedoxClient against the fake API."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from receiver.fault_injection.api_faults import ApiFault
from receiver.outbound import AnswerLost, BadAnswer, Limits, Unsendable
from receiver.simulator.api import FakeRedoxApi
from receiver.simulator.api_exchange import SimulatedApiAnswer
from tests.outbound.conftest import Connect, message


def test_a_file_is_uploaded(api: FakeRedoxApi, connect: Connect, tmp_path: Path) -> None:
    """A path, bytes or an open file is uploaded whole under the field `file`, wherever it was read to."""
    path = tmp_path / "scan.pdf"
    path.write_bytes(os.urandom(300_000))
    client = connect(source="source-1")
    with path.open("rb") as opened:
        opened.read(7)
        uris = [
            client.upload(path),
            client.upload(str(path)),
            client.upload(path.read_bytes(), filename="scan.pdf"),
            client.upload(opened, media_type="application/pdf"),
            client.upload(io.BytesIO(path.read_bytes())),
        ]

    assert len({*uris}) == 5
    assert all(api.uploads[uri] == path.read_bytes() for uri in uris)
    sent = api.received("/uploads")
    assert all(b'name="file"; filename="scan.pdf"\r\nContent-Type: application/pdf' in one.body for one in sent[:4])
    assert {one.headers["redox-source-id"] for one in sent} == {"source-1"}


def test_an_upload_survives_a_refused_token_and_a_503(api: FakeRedoxApi, connect: Connect, tmp_path: Path) -> None:
    """Each attempt reads the file from its beginning."""
    path = tmp_path / "scan.pdf"
    path.write_bytes(os.urandom(300_000))
    client = connect()
    client.send(message())
    api.refuse_tokens()
    api.fail("/uploads", ApiFault.UNAVAILABLE)

    assert api.uploads[client.upload(path)] == path.read_bytes()
    assert len(api.received("/uploads")) == 3


def test_files_without_a_size(api: FakeRedoxApi, connect: Connect, tmp_path: Path) -> None:
    """A text file and a pipe are refused with an error that says what to do. A missing file is a FileNotFoundError."""
    client: Any = connect()
    with pytest.raises(Unsendable, match="binary mode"):
        client.upload(io.StringIO("text"))
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe, os.fdopen(writing, "wb"), pytest.raises(Unsendable, match="into bytes"):
        client.upload(pipe)
    with pytest.raises(FileNotFoundError):
        client.upload(tmp_path / "missing")
    assert api.requests == []


@pytest.mark.parametrize("options", [{"filename": "\ud800.pdf"}, {"media_type": "a/b\r\nX: y"}], ids=["name", "type"])
def test_a_file_with_an_impossible_name(api: FakeRedoxApi, connect: Connect, options: dict[str, str]) -> None:
    """A name or media type that no header can hold is refused before anything is sent."""
    with pytest.raises(Unsendable, match="name or media type"):
        connect().upload(b"x", **options)
    assert api.requests == []


@pytest.mark.parametrize("change", [b"and more", b""], ids=["grows", "shrinks"])
def test_a_file_that_changes_while_it_is_read(api: FakeRedoxApi, connect: Connect, change: bytes) -> None:
    """A file that grows or shrinks while it is read is not uploaded."""

    class Changing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(size) + change if change else b""

    client = connect()
    with pytest.raises(Unsendable, match="size of the file changed"):
        client.upload(Changing(b"synthetic"))
    assert api.uploads == {}
    assert client.upload(b"synthetic") in api.uploads


def test_a_file_that_comes_slowly(api: FakeRedoxApi, connect: Connect) -> None:
    """The total timeout includes reading the file."""

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            threading.Event().wait(0.6)
            return super().read(size)

    client = connect(limits=Limits(total=0.5))
    client.send(message())
    with pytest.raises(AnswerLost):
        client.upload(Slow(b"synthetic"))
    assert api.uploads == {}


def test_an_upload_without_a_uri_is_an_error(api: FakeRedoxApi, connect: Connect) -> None:
    """An answer to an upload without a URI is BadAnswer."""
    for body in ({}, {"URI": 7}, {"URI": ""}, b"[]"):
        api.fail("/uploads", SimulatedApiAnswer(body=body))
        with pytest.raises(BadAnswer, match="contains no URI"):
            connect().upload(b"x")
