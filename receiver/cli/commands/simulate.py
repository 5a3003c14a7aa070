"""The command `simulate`: simulates Redox against a running receiver, and checks its answers.

Must not read the local database, except the destination's environment, policy and a registered source, and with --api
the API keys.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import click

from receiver import settings as table
from receiver.cli import output, session
from receiver.cli.options import SECRET_FILE, example, json_option, read_secret
from receiver.cli.simulated_api import loopback, serve_api
from receiver.cli.simulation_report import report
from receiver.errors import ConfigurationError, ReceiverError
from receiver.protocol.patterns import matches, normalize_pattern
from receiver.samples import sample
from receiver.simulator.attacks import AttackTarget
from receiver.simulator.client_auth_file import read_authenticator
from receiver.simulator.signer import Signer
from receiver.simulator.simulation import Simulation, SimulationPlan
from receiver.storage.operations import queries

# The synthetic source that --register registers.
_SYNTHETIC_SOURCE: Final = "00000000-0000-4000-8000-000000000000"


@click.command(
    epilog=example(
        "simulate --destination lab --token-file lab.token",
        "simulate --destination lab --token-file lab.token --kind 'PatientAdmin.*' --count 100 --feeds 8",
        "simulate --url http://127.0.0.1:8080 --destination lab --token-file - --source UUID --misbehave < lab.token",
        "simulate --destination lab --token-file lab.token --api 127.0.0.1:8090",
    )
)
@click.option("--url", metavar="URL", help="Base URL of the receiver.  [default: http://RECEIVER_BIND]")
@click.option("--destination", required=True, metavar="NAME", help="Name of the destination to post to.")
@click.option(
    "--token-file",
    required=True,
    type=SECRET_FILE,
    metavar="FILE",
    help="Read its verification token from FILE (-: stdin).",
)
@click.option(
    "--signing-secret-file",
    type=SECRET_FILE,
    metavar="FILE",
    help="Sign with the webhook signing secret in FILE (-: stdin), in the default format of `credential add --kind "
    "hmac`. Default: no signature.",
)
@click.option(
    "--present",
    "presenting",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also present the credential that FILE (TOML) describes; may be repeated.",
)
@click.option(
    "--source",
    metavar="UUID",
    help="Id of the source to send as.  [default: a registered source, if the local database is available]",
)
@click.option("--register", is_flag=True, help="If the destination has no source, register a synthetic one.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    metavar="KIND",
    help="Kind of messages to send: Model.Event, Model.*, FHIR.* or *; may be repeated.  [default: *]",
)
@click.option(
    "--file",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Send the content of FILE unchanged; may be repeated. Without --kind, only files are sent.",
)
@click.option(
    "--count",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Number of messages of each kind.",
)
@click.option(
    "--feeds",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    metavar="N",
    help="Number of concurrent feeds; each sends one message at a time.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    metavar="R",
    help="Largest number of messages per second, for all feeds. Default: no limit.",
)
@click.option(
    "--time-scale",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    metavar="X",
    help="Factor for Redox's pauses: 0.01 makes them a hundred times shorter.",
)
@click.option(
    "--patience",
    "timeout",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Seconds until a paused feed gives up. Redox never gives up.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    metavar="N",
    help="Seed of the messages. The same seed sends the same messages, as duplicates.  [default: random]",
)
@click.option("--live", is_flag=True, help="Send messages with Meta.Test false instead of true.")
@click.option(
    "--misbehave",
    is_flag=True,
    help="Also send requests that must be refused (wrong tokens, unknown sources, invalid bodies), and drop answers.",
)
@click.option(
    "--api",
    metavar="HOST:PORT",
    callback=loopback,
    help="Also simulate Redox's API at this loopback address, for API keys with this base URL. Default: no API.",
)
@click.option("--production", is_flag=True, help="Allow synthetic messages to a production destination.")
@json_option
def simulate(
    *,
    url: str | None,
    destination: str,
    token_file: Path,
    signing_secret_file: Path | None,
    presenting: Sequence[Path],
    source: str | None,
    kinds: Sequence[str],
    files: Sequence[Path],
    api: tuple[str, int] | None,
    register: bool,
    production: bool,
    misbehave: bool,
    live: bool,
    seed: int | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Simulate Redox against a running receiver.

    Verifies the destination, then sends messages in order in each feed, one at a time, with the pauses and retries of
    Redox, some of them twice. Also sends queries. Prints a summary. Patients and messages are synthetic.
    Exit status 1 if an answer was wrong.

    \b
    A FILE for --present; paths are relative to it (hmac, jwt, google, oauth, smart, sigv4, mtls):
      kind = "oauth"
      client_id = "redox"
      secret_file = "lab.secret"
    """
    url = url or f"http://{table.load_settings().bind}"
    known = _look_up(url, destination)
    _refuse_production(url, destination, known, production=production)
    source = source or known.get("source_id")
    if source is None:
        source = _register(destination, known, wanted=register)
    signer = None if signing_secret_file is None else Signer(secret=read_secret(signing_secret_file).encode())
    target = AttackTarget(
        base_url=url,
        destination=destination,
        token=read_secret(token_file),
        source_id=source,
        signer=signer,
        authenticators=tuple(read_authenticator(path, base_url=url, destination=destination) for path in presenting),
    )
    seed = random.randrange(1_000_000_000) if seed is None else seed  # noqa: S311 - no secret
    plan = SimulationPlan(
        kinds=_kinds(kinds, files),
        bodies=[file.read_bytes() for file in files],
        seed=seed,
        test=not live,
        misbehave=misbehave,
        unknown_source=known.get("unknown_source", 403),
        **how,
    )
    simulation = Simulation(target, plan)
    with serve_api(api, url, destination, plan.timeout) as count_sent:
        with output.progress("sending", simulation.total) as advance:
            results = simulation.run(lambda _: advance(1))
        sent = count_sent()
    report(results, simulation.refused(), seed, sent, as_json=as_json)
    if any(result.wrong for result in results) or len(results) < simulation.total:
        click.get_current_context().exit(1)


def _kinds(patterns: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Return the requested kinds that have a sample. Raises BadParameter for a pattern without a sample."""
    if not patterns:
        return [] if files else list(sample.kinds())
    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            some = [kind for kind in sample.kinds() if matches([normalize_pattern(pattern)], kind)]
        except ValueError as exc:
            raise click.BadParameter(str(exc)) from None
        if not some:
            raise click.BadParameter(f"no sample matches {pattern}: use Model.Event, Model.*, FHIR.* or *")
        found.update(dict.fromkeys(some))
    return list(found)


def _here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _look_up(url: str, destination: str) -> dict[str, Any]:
    """Read the destination from the local database. Empty if the database is not available, or the URL is remote."""
    if not _here(url):
        return {}
    try:
        with session.opened() as opened, opened.engine.connect() as connection:
            found = queries.destination_named(connection, destination)
            sources = [
                each["source_id"]
                for each in queries.sources(connection, destination=destination)
                if each["enabled"] and each["source_id"]
            ]
    except ReceiverError:
        return {}
    open_to_all = found["sources_policy"] == "any" or found["on_unknown_source"] == "quarantine"
    return {
        "environment": found["environment"],
        "unknown_source": 200 if open_to_all else 403,
        **({"source_id": sources[0]} if sources else {}),
    }


def _register(destination: str, known: Mapping[str, Any], *, wanted: bool) -> str:
    """Register the synthetic source at a destination without sources. Returns its id. Raises UsageError."""
    if not known:
        raise click.UsageError("the local database is not available: give a registered source with --source")
    if not wanted:
        raise click.UsageError(
            f"{destination} has no registered source: add --register to register a synthetic one "
            f"({_SYNTHETIC_SOURCE}), or give a registered one with --source"
        )
    with session.opened() as opened:
        opened.registration.add_source(destination, _SYNTHETIC_SOURCE, datetime.now(UTC), name="simulate")
    output.say(
        f"registered the source {_SYNTHETIC_SOURCE}: "
        f"`redox-receiver source disable {destination} {_SYNTHETIC_SOURCE}` disables it"
    )
    return _SYNTHETIC_SOURCE


def _refuse_production(url: str, destination: str, known: Mapping[str, Any], *, production: bool) -> None:
    if production:
        return
    if known.get("environment") == "production":
        raise ConfigurationError(
            f"{destination} is a production destination: add --production to send synthetic messages to it"
        )
    if not known and not _here(url):
        raise ConfigurationError(
            f"{destination} at {url} may be a production destination, which cannot be checked from "
            "here: add --production to send synthetic messages to it"
        )
