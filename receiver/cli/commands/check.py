"""The command `check`: checks the configuration and state of this host.

Must not fix anything: each finding names its fix.
"""

from __future__ import annotations

import click

from receiver.cli.checks.result import report
from receiver.cli.checks.run import check_everything
from receiver.cli.options import example, json_option


@click.command(epilog=example("check", "check --url https://redox.hospital.example"))
@click.option(
    "--url", metavar="URL", help="Public URL of the receiver, also to be checked from this host. Default: not checked."
)
@json_option
def check(url: str | None, as_json: bool) -> None:
    """Check settings, files, database, keys, credentials, workers, clock and disk, and show the findings of `status`.

    Each line is OK, or names the fix. Exit status 1 if a line is BAD.
    """
    report(check_everything(url), as_json=as_json)
