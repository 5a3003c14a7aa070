"""The command group `outbound`: calls to Redox from the command line, and the API keys for them.

Every call is in the audit log with its reason before it is made.

Must not print an answer of Redox, which may contain patient data: it goes into a new file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, cast

import click
import msgspec

from receiver.cli import output
from receiver.cli.options import (
    SECRET_FILE,
    example,
    json_option,
    open_new_file,
    options,
    read_secret,
    reason_option,
    take_stdin,
)
from receiver.cli.session import Session, opened
from receiver.outbound.answers import Answer
from receiver.outbound.api import ApiProfile, RedoxApi
from receiver.outbound.fhir import Environment, FhirDestination
from receiver.outbound.limits import SlidingWindow
from receiver.outbound.outbox import Caller, Clients, OutboundRecorder, RecordedClient
from receiver.outbound.outbox.clients import UPLOAD_PATH
from receiver.outbound.wire import check_base_url
from receiver.protocol.api_keys import CANADA, US, LegacyKey
from receiver.storage.registry import api_keys
from receiver.storage.registry.api_keys import ApiEndpoint, ApiKeys, OAuthKeySpec

COLUMNS: Final = ("name", "environment", "kind", "base_url", "source_id", "client_id", "kid")
_REGIONS: Final = {"us": US, "canada": CANADA}


@click.group()
def outbound() -> None:
    """Call Redox: API keys, tokens, and single messages, queries and FHIR calls."""


@outbound.group()
def key() -> None:
    """Manage the API keys, each for one Redox environment and one source."""


@key.command(
    epilog=example(
        "outbound key add staging --environment staging --client-id ID --source UUID",
        "outbound key add old --environment production --legacy-file key.json",
    )
)
@click.argument("name")
@click.option(
    "--environment",
    required=True,
    type=click.Choice(["development", "staging", "production"]),
    help="Redox environment of the key.",
)
@click.option("--region", type=click.Choice(list(_REGIONS)), help="Redox region.  [default: us]")
@click.option("--base-url", metavar="URL", help="Base URL of the API, instead of --region.")
@click.option("--source", "source_id", metavar="UUID", help="Id of the source that sends with this key.")
@click.option("--client-id", metavar="ID", help="Client id of an OAuth API key, from the Redox dashboard.")
@click.option(
    "--private-key",
    type=SECRET_FILE,
    metavar="FILE",
    help="Private key as PEM or JWK (-: stdin).  [default: the active key of `signing-key`]",
)
@click.option("--kid", metavar="KID", help="Key id (kid) of that private key at Redox.")
@click.option("--scope", metavar="TEXT", help="Scope to request for tokens. Default: none.")
@click.option(
    "--legacy-file",
    type=SECRET_FILE,
    metavar="FILE",
    help='A legacy API key, as {"apiKey": "…", "secret": "…"} (-: stdin).',
)
@click.option(
    "--query-path",
    default="/endpoint",
    show_default=True,
    metavar="PATH",
    help="URL path for queries; /query in older configurations.",
)
@click.option("--replace", is_flag=True, help="Replace the existing key NAME.")
@json_option
def add(
    name: str,
    *,
    environment: str,
    region: str | None,
    base_url: str | None,
    source_id: str | None,
    query_path: str,
    legacy_file: Path | None,
    replace: bool,
    as_json: bool,
    **oauth: Any,
) -> None:
    """Register an API key as NAME: an OAuth key (--client-id), or a legacy key (--legacy-file)."""
    if region is not None and base_url is not None:
        raise click.UsageError("--region and --base-url exclude each other: use one of them")
    if (legacy_file is None) == (oauth["client_id"] is None):
        raise click.UsageError("give --client-id for an OAuth API key, or --legacy-file for a legacy one")
    if any(oauth.values()) and legacy_file is not None:
        raise click.UsageError("--private-key, --kid and --scope require --client-id")
    where = ApiEndpoint(
        environment=environment,
        base_url=check_base_url(base_url or _REGIONS[region or "us"]),
        source_id=source_id,
        query_path=query_path,
    )
    given = _oauth(**oauth) if legacy_file is None else _legacy(legacy_file)
    ApiProfile(
        legacy=legacy_file is not None,
        source=source_id,
        several_keys=False,
        query_path=query_path,
        upload_path=UPLOAD_PATH,
    )  # raises if the combination is not usable
    with opened() as session:
        row = ApiKeys(session.engine, session.keyring, actor=session.actor).add_api_key(
            name, where, given, datetime.now(UTC), replace=replace
        )
    output.row(row, as_json=as_json)


def _oauth(client_id: str, private_key: Path | None, kid: str | None, scope: str | None) -> OAuthKeySpec:
    if private_key is None and kid is not None:
        raise click.UsageError("--kid requires --private-key")
    text = None if private_key is None else read_secret(private_key).encode()
    return OAuthKeySpec(client_id=client_id, private_key=text, kid=kid, scope=scope)


def _legacy(file: Path) -> LegacyKey:
    try:
        members = msgspec.json.decode(read_secret(file), type=dict[str, str])
        return LegacyKey(api_key=members["apiKey"], secret=members["secret"])
    except (msgspec.MsgspecError, KeyError):
        raise click.BadParameter('the file is not valid: it must contain {"apiKey": "…", "secret": "…"}') from None


@key.command("list", epilog=example("outbound key list"))
@output.columns_option
@json_option
def list_(*, as_json: bool) -> None:
    """List the API keys. An OAuth key without a kid uses the active key of `signing-key`."""
    with opened() as session, session.engine.connect() as connection:
        found = api_keys.rows(connection)
    output.rows(found, COLUMNS, as_json=as_json, nothing="no API key yet: `redox-receiver outbound key add NAME`")


_key = click.option("--key", "name", metavar="NAME", help="API key to use. Required if there are several.")
_calls = options(
    click.argument("file", type=SECRET_FILE),
    click.option(
        "--out",
        required=True,
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Write the answer of Redox to the new FILE (mode 0600).",
    ),
    reason_option,
    _key,
    json_option,
)


@outbound.command(epilog=example("outbound token --key staging"))
@_key
@json_option
def token(*, name: str | None, as_json: bool) -> None:
    """Get an access token from Redox to test the key. Prints its expiry, never the token."""
    with _clients(name) as (session, clients, chosen):
        with session.engine.connect() as connection:
            base_url = api_keys.load_api_keys(connection, session.keyring, chosen).base_url
        given = clients.client(chosen).auth.token()
    expires = datetime.now(UTC) + timedelta(seconds=given.lifetime)
    output.row({"api_key": chosen, "base_url": base_url, "expires_at": expires.replace(microsecond=0)}, as_json=as_json)


@outbound.command(epilog=example("outbound send note.json --out answer.json --reason 'ticket 4711'"))
@_calls
def send(file: Path, **how: Any) -> None:
    """Send the Data Model message in FILE (-: stdin).

    The answer means that Redox accepted it, not that it was delivered.
    """
    message = _read(file)
    _call(lambda redox, _: redox.send(message), **how)


@outbound.command(epilog=example("outbound query search.json --out found.json --reason 'ticket 4711'"))
@_calls
def query(file: Path, **how: Any) -> None:
    """Send the query in FILE (-: stdin) to one destination."""
    message = _read(file)
    _call(lambda redox, _: redox.query(message), **how)


@outbound.command(
    epilog=example(
        "outbound fhir params.json --to our-ehr --resource Patient --search --out found.json --reason 'ticket 4711'",
        "outbound fhir bundle.json --to our-ehr --resource Patient --operation '$patient-update' --out done.json "
        "--reason 'ticket 4711'",
    )
)
@click.option("--to", required=True, metavar="SLUG", help="Slug of the destination, from the Redox dashboard.")
@click.option("--resource", required=True, metavar="TYPE", help="FHIR resource type, such as Patient.")
@click.option("--search", "what", flag_value="search", help="Search: FILE contains the parameters as a JSON object.")
@click.option("--read", "what", flag_value="read", help="Read: FILE contains the id, since it may identify a patient.")
@click.option("--operation", metavar="NAME", help="Operation NAME: FILE contains the resource or the message Bundle.")
@click.option(
    "--environment",
    type=click.Choice(["Development", "Staging", "Production"]),
    help="Redox environment.  [default: that of the API key]",
)
@_calls
def fhir(
    file: Path, *, to: str, resource: str, what: str | None, operation: str | None, environment: str | None, **how: Any
) -> None:
    """Call the FHIR R4 API of a destination, with the content of FILE (-: stdin)."""
    if (what is None) == (operation is None):
        raise click.UsageError("give exactly one of --search, --read and --operation NAME")
    content = _read(file)

    def call(redox: RedoxApi, of: str) -> Answer:
        return _fhir(
            redox.fhir(to, cast("Environment", environment or of.capitalize())), resource, what, operation, content
        )

    _call(call, **how)


def _fhir(
    at: FhirDestination[Answer], resource: str, what: str | None, operation: str | None, content: bytes
) -> Answer:
    if operation is not None:
        return at.operation(resource, operation, content)
    if what == "read":
        return at.read(resource, content.decode(errors="replace").strip())
    try:
        parameters = msgspec.json.decode(content, type=dict[str, str | list[str]])
    except msgspec.MsgspecError:
        raise click.BadParameter(
            "the search parameters are not valid: use a JSON object of strings, or lists of strings"
        ) from None
    return at.search(resource, parameters)


def _call(make: Callable[[RedoxApi, str], Answer], *, name: str | None, out: Path, reason: str, as_json: bool) -> None:
    """Make the call with a client and the environment of the key, and write the answer to `out`."""
    with _clients(name) as (session, clients, chosen), open_new_file(out) as file:
        recorder = OutboundRecorder(session.engine, session.keyring)
        redox = RecordedClient(clients, recorder, chosen, Caller(name=session.actor, reason=reason))
        with session.engine.connect() as connection:
            environment = api_keys.load_api_keys(connection, session.keyring, chosen).environment
        answer = make(redox, environment)
        file.write(answer.body)
    output.row(
        {
            "api_key": chosen,
            "status": answer.status,
            "log_ids": list(answer.log_ids),
            "out": str(out),
            "size": len(answer.body),
        },
        as_json=as_json,
    )


@contextmanager
def _clients(name: str | None) -> Iterator[tuple[Session, Clients, str]]:
    """A session, its clients, and the name of the selected key."""
    with (
        opened() as session,
        Clients(session.engine, session.keyring, rate=SlidingWindow(session.settings.redox_rate)) as clients,
    ):
        if name is None:
            with session.engine.connect() as connection:
                name = api_keys.only_one(connection)
        yield session, clients, name


def _read(file: Path) -> bytes:
    try:
        return take_stdin("FILE").read() if str(file) == "-" else file.read_bytes()
    except OSError as exc:
        raise click.BadParameter(f"{file} cannot be read: {exc.strerror}") from None
