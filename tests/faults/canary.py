"""Searches for secrets where they must not be: tables, files, processes and texts.

Finds a secret as it is, in upper or lower case, in hexadecimal and in base64. A result names the secret and the place,
but quotes neither.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import psutil
import psycopg
from psycopg import sql


class Canaries:
    """Secrets by name. Each must have 8 bytes or more, so that it is not found by chance."""

    def __init__(self, secrets: Mapping[str, str | bytes]) -> None:
        self._forms: dict[str, tuple[bytes, ...]] = {}
        for name, secret in secrets.items():
            plain = secret.encode() if isinstance(secret, str) else secret
            assert len(plain) >= 8, f"{name} is too short to search for"
            self._forms[name] = tuple(form.lower() for form in (plain, plain.hex().encode(), *_base64(plain)))

    def within(self, text: str | bytes, where: str) -> list[str]:
        """Return the secrets in a text."""
        data = (text.encode(errors="surrogateescape") if isinstance(text, str) else text).lower()
        return [f"{name} in {where}" for name, forms in self._forms.items() if any(form in data for form in forms)]

    def in_files(self, root: Path, *, but: Iterable[Path] = ()) -> Iterator[str]:
        """Yield the secrets in the files under a directory, or in the name of a file."""
        left_out = set(but)
        for path in sorted(root.rglob("*")):
            yield from self.within(path.name, f"the name of a file in {path.parent}")
            if path.is_file() and path not in left_out:
                yield from self.within(path.read_bytes(), str(path))

    def in_processes(self, processes: Iterable[psutil.Process]) -> Iterator[str]:
        """Yield the secrets in the command line or environment of a process."""
        for process in processes:
            for what in ("cmdline", "environ"):
                try:
                    text = Path(f"/proc/{process.pid}/{what}").read_bytes()
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue  # it has ended, or it is PostgreSQL, whose environment only its account can read
                yield from self.within(text, f"/proc/PID/{what} of {process.name()}")

    def in_tables(self, url: str) -> Iterator[str]:
        """Yield the secrets in any column of any table, and in the statements in pg_stat_activity."""
        with psycopg.connect(url) as connection:
            tables = connection.execute(
                "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', "
                "'information_schema') ORDER BY 1, 2"
            ).fetchall()
            for schema, table in tables:
                query = sql.SQL("COPY (SELECT * FROM {}) TO STDOUT").format(sql.Identifier(schema, table))
                with connection.cursor().copy(query) as rows:
                    yield from self.within(b"".join(rows), f"table {schema}.{table}")
            shown = connection.execute(
                "SELECT string_agg(query, ' ') FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
            ).fetchone()
            assert shown is not None
            yield from self.within(shown[0] or "", "pg_stat_activity")


def _base64(plain: bytes) -> Iterator[bytes]:
    """Yield, for each offset, the base64 characters that depend only on these bytes."""
    for before in range(3):
        first, last = -(-8 * before // 6), 8 * (before + len(plain)) // 6
        yield b64encode(bytes(before) + plain)[first:last]
