"""`simulate`: plays Redox against a running receiver, and judges its answers.

May not look into the receiver but for what keeps it from harm: where the local database tells, the destination's
environment, its policy and a registered source; and with --api the keys that handlers speak with.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import click

from receiver import settings as table
from receiver.cli import output, session
from receiver.cli.options import SECRET_FILE, example, json_option, read_secret
from receiver.cli.simulated_api import loopback, played
from receiver.errors import ConfigurationError, ReceiverError
from receiver.protocol.patterns import matches, normalise_pattern
from receiver.samples import sample
from receiver.simulator.attacks import AttackTarget
from receiver.simulator.client_auth import read_authenticator
from receiver.simulator.signer import Signer
from receiver.simulator.simulation import OUTCOMES, SimulatedResult, Simulation, SimulationPlan
from receiver.storage.operations import queries

# Wrong results that are printed one by one; the rest is counted.
_SHOWN: Final = 20
# The source that --register registers: of no hospital.
_MADE_UP: Final = "00000000-0000-4000-8000-000000000000"


@click.command(
    epilog=example(
        "simulate --destination lab --token-file lab.token",
        "simulate --destination lab --token-file lab.token --kind 'PatientAdmin.*' --count 100 --feeds 8",
        "simulate --url http://127.0.0.1:8080 --destination lab --token-file - --source UUID --misbehave < lab.token",
        "simulate --destination lab --token-file lab.token --api 127.0.0.1:8090",
    )
)
@click.option("--url", metavar="URL", help="Where the receiver listens.  [default: http://RECEIVER_BIND]")
@click.option("--destination", required=True, metavar="NAME", help="The destination to post to.")
@click.option(
    "--token-file",
    required=True,
    type=SECRET_FILE,
    metavar="FILE",
    help="Its verification token; - reads it from stdin.",
)
@click.option(
    "--signing-secret-file",
    type=SECRET_FILE,
    metavar="FILE",
    help="Sign with the webhook signing secret in FILE, as `credential add --kind hmac` expects by default.",
)
@click.option(
    "--present",
    "presenting",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also prove it as FILE (TOML) says, by a credential of any kind; may be repeated.",
)
@click.option(
    "--source",
    metavar="UUID",
    help="The source to name.  [default: one that is registered, if the database can be asked]",
)
@click.option("--register", is_flag=True, help="If the destination has no source, register a made-up one.")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    metavar="KIND",
    help="Model.Event, Model.*, FHIR.* or *; may be repeated.  [default: one of each]",
)
@click.option(
    "--file",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A body to send as it is; may be repeated.",
)
@click.option(
    "--count", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Messages of each kind."
)
@click.option(
    "--feeds",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    metavar="N",
    help="Feeds at once; each sends one message at a time.",
)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), metavar="R", help="Messages a second, all feeds together."
)
@click.option(
    "--time-scale",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    metavar="X",
    help="0.01 makes Redox's pauses a hundredth.",
)
@click.option(
    "--patience",
    "timeout",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a paused feed tries before it is given up; Redox never does that.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    metavar="N",
    help="The same seed sends the same messages; a second time they are duplicates.  [default: a new one]",
)
@click.option("--live", is_flag=True, help="Meta.Test false.  [default: true]")
@click.option(
    "--misbehave",
    is_flag=True,
    help="Also send what must be refused: wrong tokens, unknown sources, bodies "
    "that are no messages; and lose answers.",
)
@click.option(
    "--api",
    metavar="HOST:PORT",
    callback=loopback,
    help="Play Redox's API there too, for what handlers send: to API keys with that base URL, on this host.",
)
@click.option("--production", is_flag=True, help="Yes, send made-up messages to a production destination.")
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
    """Play Redox against a running receiver.

    Makes the handshake, then sends messages, first in first out in each feed, one at a time, with pauses and retries as
    Redox makes them, some of them twice; asks queries; and at the end tells what became of it all. People and messages
    are made up. Exit status 1 when anything was not answered as it should be.

    \b
    A FILE for --present, paths from its folder (kinds: hmac, jwt, google, oauth, smart, sigv4, mtls):
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
    with played(api, url, destination, plan.timeout) as came:
        with output.progress("sending", simulation.total) as advance:
            results = simulation.run(lambda _: advance(1))
        sent = came()
    _report(results, simulation.refused(), seed, sent, as_json=as_json)
    if any(result.wrong for result in results) or len(results) < simulation.total:
        click.get_current_context().exit(1)


def _kinds(patterns: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Every kind that is asked for and that there is a sample of. Raises BadParameter for a pattern that has none."""
    if not patterns:
        return [] if files else list(sample.kinds())
    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            some = [kind for kind in sample.kinds() if matches([normalise_pattern(pattern)], kind)]
        except ValueError as exc:
            raise click.BadParameter(str(exc)) from None
        if not some:
            raise click.BadParameter(f"there is no sample of {pattern}")
        found.update(dict.fromkeys(some))
    return list(found)


# --- what must not happen


def _here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _look_up(url: str, destination: str) -> dict[str, Any]:
    """What the local database knows of the destination; nothing where it cannot be asked, or another host is meant."""
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
    """Register the made-up source at the destination, which has none; its id. Raises UsageError."""
    if not known:
        raise click.UsageError("name a registered source with --source: the database cannot be asked for one")
    if not wanted:
        raise click.UsageError(
            f"{destination} has no registered source: add --register to register a made-up one "
            f"({_MADE_UP}), or name one that you have registered with --source"
        )
    with session.opened() as opened:
        opened.registration.add_source(destination, _MADE_UP, datetime.now(UTC), name="simulate")
    output.say(
        f"registered the source {_MADE_UP}: `redox-receiver source disable {destination} {_MADE_UP}` refuses it again"
    )
    return _MADE_UP


def _refuse_production(url: str, destination: str, known: Mapping[str, Any], *, production: bool) -> None:
    if production:
        return
    if known.get("environment") == "production":
        raise ConfigurationError(
            f"{destination} is a production destination: made-up messages do not belong there. If "
            "you mean it, say --production"
        )
    if not known and not _here(url):
        raise ConfigurationError(
            f"whether {destination} at {url} is a production destination cannot be known from "
            "here: if made-up messages may go there, say --production"
        )


# --- what became of it


def _report(
    results: Sequence[SimulatedResult],
    refused: Mapping[str, int],
    seed: int,
    came: Mapping[str, int] | None,
    *,
    as_json: bool,
) -> None:
    """`refused`: see Simulation.refused. `came`: what handlers have sent, by its kind; None where no API was played."""
    summary = [_summed(outcome, seconds) for outcome, seconds in _by_outcome(results).items()]
    wrong = [result for result in results if result.wrong is not None]
    if as_json:
        output.document(
            {
                "seed": seed,
                "summary": summary,
                "wrong": [asdict(result) for result in wrong],
                "retried": sum(result.attempts > 1 for result in results),
                "retries": dict(refused),
                **({} if came is None else {"came": came}),
            }
        )
        return
    output.rows(summary, ["outcome", "count", "median_ms", "p95_ms", "max_ms"], as_json=False, nothing="nothing sent")
    for result in wrong[:_SHOWN]:
        click.echo(f"{output.escaped(result.what)}: {output.escaped(result.wrong or '')}")
    if len(wrong) > _SHOWN:
        click.echo(f"and {len(wrong) - _SHOWN} more")
    if refused:
        told = ", ".join(f"{reason} {number:,}" for reason, number in refused.items())
        click.echo(
            f"{output.count(sum(refused.values()), 'attempt was', 'attempts were')} not accepted and made again "
            f"({told})"
        )
    if came is not None:
        told = ", ".join(f"{output.escaped(kind)} {count}" for kind, count in came.items())
        click.echo(f"handlers have sent to Redox: {told or 'nothing'}")
    click.echo(f"seed {seed}; " + (f"{len(wrong)} not as it should be" if wrong else "all as it should be"))


def _by_outcome(results: Sequence[SimulatedResult]) -> dict[str, list[float]]:
    found: defaultdict[str, list[float]] = defaultdict(list)
    for result in results:
        found[result.outcome].append(result.seconds)
    return {outcome: found[outcome] for outcome in OUTCOMES if outcome in found}


def _summed(outcome: str, seconds: Sequence[float]) -> dict[str, Any]:
    cuts = statistics.quantiles(seconds, n=20, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 19
    return {
        "outcome": outcome,
        "count": len(seconds),
        "median_ms": round(cuts[9] * 1000, 1),
        "p95_ms": round(cuts[18] * 1000, 1),
        "max_ms": round(max(seconds) * 1000, 1),
    }
