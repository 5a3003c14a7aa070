from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import click
import pytest

from receiver.cli.options import MessageId, When, example, new_file, read_secret


@pytest.mark.parametrize(
    ("text", "ago"),
    [
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("2h", timedelta(hours=2)),
        ("3d", timedelta(days=3)),
        ("2w", timedelta(weeks=2)),
    ],
)
def test_spans_are_from_now(text: str, ago: timedelta) -> None:
    """A duration means that long ago, or that far ahead for an expiry."""
    before = datetime.now(UTC)
    back, ahead = (When(ahead=each).convert(text, None, None) for each in (False, True))
    after = datetime.now(UTC)
    assert before - ago <= back <= after - ago
    assert before + ago <= ahead <= after + ago


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-01-31T08:00", datetime(2026, 1, 31, 8, tzinfo=UTC)),
        ("2026-01-31", datetime(2026, 1, 31, tzinfo=UTC)),
        ("2026-01-31T08:00:00Z", datetime(2026, 1, 31, 8, tzinfo=UTC)),
        ("2026-01-31T08:00:00+02:00", datetime(2026, 1, 31, 6, tzinfo=UTC)),
    ],
)
def test_times_are_utc(text: str, time: datetime) -> None:
    """An ISO 8601 time without an offset is UTC. The result is always aware."""
    found = When().convert(text, None, None)
    assert found == time
    assert found.utcoffset() == timedelta(0)


@pytest.mark.parametrize("text", ["", "yesterday", "2h30m", "-2h", "999999w", "0001-01-01T00:00:00+14:00", "12:00"])
def test_what_is_no_time(text: str) -> None:
    """Anything else is wrong usage, and the error shows the format."""
    with pytest.raises(click.BadParameter, match="15m"):
        When().convert(text, None, None)


def test_a_message_by_id_or_uuid() -> None:
    """An id or a UUID names a message. Anything else is wrong usage."""
    uuid = "0192f0c1-2345-7678-9abc-def012345678"
    assert MessageId().convert("81", None, None) == 81
    assert MessageId().convert(uuid, None, None) == UUID(uuid)
    for wrong in ("", "x", "-1", "1" * 19):
        with pytest.raises(click.BadParameter):
            MessageId().convert(wrong, None, None)


def test_a_secret_is_what_is_in_the_file(tmp_path: Path) -> None:
    """A secret is the content of the file without the end of its line."""
    (tmp_path / "one").write_text(" s e cret \n")
    (tmp_path / "two").write_bytes(b"secret\r\n")
    assert read_secret(tmp_path / "one") == " s e cret "
    assert read_secret(tmp_path / "two") == "secret"
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for wrong in ("binary", "missing"):
        with pytest.raises(click.BadParameter, match=wrong):
            read_secret(tmp_path / wrong)


def test_a_new_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    """A new file is written before the block runs, with mode 0600, and never replaces another."""
    path = tmp_path / "token"
    with new_file(path, b"secret"):
        assert path.read_bytes() == b"secret"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(click.BadParameter, match="exists"), new_file(path, b"other"):
        pass
    assert path.read_bytes() == b"secret"


def test_a_file_of_what_failed_is_taken_back(tmp_path: Path) -> None:
    """If the block fails, the secret in the file is useless, and the file is removed."""
    with pytest.raises(ZeroDivisionError), new_file(tmp_path / "token", b"secret"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_long_examples_are_folded_for_a_shell() -> None:
    """A long line continues after a backslash, so that it can be pasted into a shell."""
    line = "messages replay --destination a-long-name --kind Results.New --since 1d --handler results --reason 'new'"
    message = example(line).splitlines()[2:]
    assert len(message) == 2
    assert message[0].endswith(" \\")
    assert " ".join("\n".join(message).replace("\\\n", "").split()) == f"redox-receiver {line}"
