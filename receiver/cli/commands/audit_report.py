"""The command `audit report`: who touched the messages of one patient.

Must not take an identifier as an argument, which other users see in `ps`, and must not print it.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Final

import click

from receiver.cli import output
from receiver.cli.options import example, json_option, reason_option, take_stdin
from receiver.cli.session import opened
from receiver.protocol.patients import PatientIdentifier
from receiver.storage.operations.patient_report import report_patient

COLUMNS: Final = ("at", "event", "actor", "outcome", "destination", "kind", "recipient", "subject", "message_id")


@click.command(
    "report",
    epilog=example(
        "audit report --patient --reason 'request 4711 of the patient' < patient.txt",
        "audit report --patient --json --reason 'request 4711 of the patient' < patient.txt",
    ),
)
@click.option("--patient", is_flag=True, required=True, help="Report on the patient that stdin names.")
@reason_option
@json_option
def report_(*, patient: bool, reason: str, as_json: bool) -> None:  # noqa: ARG001 - the flag names the report
    """Show who touched a patient: which messages were received, handled, viewed, corrected, answered and sent, by whom.

    Reads lines from stdin: the identifier; its type, such as MR (empty if it has none); and, if you want one authority
    alone, the id of the source or FHIR's identifier.system. The report is a disclosure: the audit log first records it
    as `audit.report`, with your reason and a keyed digest of the identifier.

    The end of the report says what it cannot cover.
    """
    if sys.stdin.isatty():
        output.say("enter the identifier, its type, and optionally its authority, each on a line; end with Ctrl-D")
    wanted = _patient(take_stdin("the patient").read())
    with opened() as session:
        found = report_patient(
            session.engine, session.keyring, wanted, datetime.now(UTC), actor=session.actor, reason=reason
        )
    if as_json:
        output.document({"events": found.events, "not_covered": found.not_covered})
        return
    output.rows(found.events, COLUMNS, as_json=False, nothing="no message names this patient")
    output.say("This report does not cover:")
    for each in found.not_covered:
        output.say(f"- {each}")


def _patient(text: bytes) -> PatientIdentifier:
    try:
        lines = [line.strip() for line in text.decode().splitlines()]
    except UnicodeDecodeError:
        raise click.UsageError("stdin is not UTF-8 text") from None
    if len(lines) not in (2, 3) or not lines[0]:
        raise click.UsageError(
            "stdin must have two or three lines: the identifier, its type (may be empty), and optionally its authority"
        )
    return PatientIdentifier(authority=(lines[2] or None) if len(lines) == 3 else None, type=lines[1], value=lines[0])
