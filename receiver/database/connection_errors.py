"""Causes of failed connections to PostgreSQL, and the setting to check.

libpq reports a failed connection as text alone, without SQLSTATE (libpq: PQerrorMessage), so the text is matched here.
The patterns are those of libpq and of a server whose lc_messages is English; any other text gets the general sentence.
Must not pass that text on: only codes and the sentences of this file are returned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy.engine import URL

_SETTING: Final = "DATABASE_URL"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cause:
    """A cause: what libpq or the server reports (any of `words`), what it means, and what to do.

    Sentences may name {where}, {host}, {user}, {database} and {setting}.
    """

    code: str
    words: tuple[str, ...]
    problem: str
    fix: str


# In this order: if several addresses were tried, the first match is the most useful.
_CAUSES: Final = (
    _Cause(
        code="password_refused",
        words=("password authentication failed",),
        problem="PostgreSQL at {where} refuses the password of user {user}, or has no such user",
        fix="correct the user and the password in {setting}",
    ),
    _Cause(
        code="password_missing",
        words=("no password supplied",),
        problem="PostgreSQL at {where} asks for the password of user {user}, and {setting} has none",
        fix="write {setting} as postgresql://USER:PASSWORD@HOST/NAME",
    ),
    _Cause(
        code="user_missing",
        words=('role "{user}" does not exist',),
        problem="PostgreSQL at {where} has no user {user}",
        fix="correct the user in {setting}, or create it",
    ),
    _Cause(
        code="database_missing",
        words=('database "{database}" does not exist',),
        problem="PostgreSQL at {where} has no database {database}",
        fix="correct the database's name in {setting}, or create it: createdb {database}",
    ),
    _Cause(
        code="database_closed",
        words=("is not currently accepting connections",),
        problem="PostgreSQL at {where} accepts no connections to database {database}",
        fix="run ALTER DATABASE {database} ALLOW_CONNECTIONS true, or correct the name in {setting}",
    ),
    _Cause(
        code="privilege_missing",
        words=("permission denied for database",),
        problem="user {user} may not connect to database {database} at {where}",
        fix="run GRANT CONNECT ON DATABASE {database} TO {user}, or correct the user in {setting}",
    ),
    _Cause(
        code="too_many_connections",
        words=("too many clients already", "remaining connection slots are reserved", "too many connections for"),
        problem="PostgreSQL at {where} has no connection left for user {user} and database {database}",
        fix="raise max_connections in postgresql.conf (or the CONNECTION LIMIT of the user or the database), or "
        "lower RECEIVER_RECEIVERS, RECEIVER_WORKERS and RECEIVER_CONCURRENCY",
    ),
    _Cause(
        code="tls_not_offered",
        words=("does not support SSL",),
        problem="{setting} requires TLS, and PostgreSQL at {where} does not offer it",
        fix="set ssl = on in postgresql.conf, or change sslmode in {setting}",
    ),
    _Cause(
        code="tls_required",
        words=("no encryption",),
        problem="PostgreSQL at {where} does not admit user {user} to database {database} from this host without TLS",
        fix="set sslmode=require in {setting}, or add a line for this host to pg_hba.conf",
    ),
    _Cause(
        code="not_admitted",
        words=("no pg_hba.conf entry", "pg_hba.conf rejects"),
        problem="PostgreSQL at {where} does not admit user {user} to database {database} from this host",
        fix="add a line for this host to pg_hba.conf, or correct the user and the database in {setting}",
    ),
    _Cause(
        code="certificate_file_missing",
        words=("root certificate file",),
        problem="sslmode in {setting} requires a check of the certificate of {where}, and the root certificate "
        "file cannot be read",
        fix="set sslrootcert in {setting} to that file, or to system",
    ),
    _Cause(
        code="certificate_not_trusted",
        words=("certificate verify failed",),
        problem="the certificate of PostgreSQL at {where} is not trusted",
        fix="set sslrootcert in {setting} to the certificate of the authority that signed it",
    ),
    _Cause(
        code="certificate_of_another_host",
        words=("does not match host name",),
        problem="the certificate of PostgreSQL at {where} is for another host",
        fix="use the host in {setting} that the certificate names",
    ),
    _Cause(
        code="tls_failed",
        words=("SSL error", "SSL SYSCALL error", "SSL negotiation"),
        problem="TLS with {where} fails",
        fix="check that PostgreSQL listens there, and check sslmode, sslcert and sslkey in {setting}",
    ),
    _Cause(
        code="starting",
        words=("the database system is",),
        problem="PostgreSQL at {where} is starting up or shutting down",
        fix="try again in a minute",
    ),
    _Cause(
        code="host_unknown",
        words=("failed to resolve host", "could not translate host name"),
        problem="the host {host} cannot be found by its name",
        fix="correct the host in {setting}, or see this machine's name resolution",
    ),
    _Cause(
        code="nothing_listens",
        words=("Connection refused", "No such file or directory"),
        problem="nothing listens at {where}",
        fix="start PostgreSQL there, or correct the host and the port in {setting}",
    ),
    _Cause(
        code="no_answer",
        words=("timeout expired", "timed out", "No route to host", "Network is unreachable"),
        problem="{where} does not answer",
        fix="check the network and the firewall on the way, or correct the host and the port in {setting}",
    ),
    _Cause(
        code="option_not_valid",
        words=("invalid sslmode value", "invalid connection option", "invalid port number"),
        problem="{setting} has an option that is not valid",
        fix="correct what follows the ? in {setting}",
    ),
)
# Not a failed connection: an existing one that has ended.
LOST: Final = "connection_lost"
_BY_CODE: Final = {each.code: each for each in _CAUSES} | {
    LOST: _Cause(
        code=LOST,
        words=(),
        problem="the connection to PostgreSQL at {where} failed",
        fix="see the log of PostgreSQL, and {setting}",
    )
}


def code_of(text: str) -> str:
    """Return the code of libpq's text about a connection."""
    for each in _CAUSES:
        # The text contains names of users and databases: only the words around them are matched.
        if any(all(part in text for part in _around(words)) for words in each.words):
            return each.code
    return LOST


def _around(words: str) -> list[str]:
    return [part for part in words.replace("{user}", "\0").replace("{database}", "\0").split("\0") if part]


def explain(code: str, url: URL) -> tuple[str, str]:
    """Return what a code of `code_of` means at this address, and what to do. Never the password."""
    host = url.host or str(url.query.get("host") or "localhost")
    where = host if host.startswith("/") else f"{host}:{url.port or url.query.get('port') or 5432}"
    named = {
        "where": where,
        "host": host,
        "user": url.username or "(none)",
        "setting": _SETTING,
        "database": url.database or url.username or "(none)",
    }
    cause = _BY_CODE[code]
    return cause.problem.format(**named), cause.fix.format(**named)
