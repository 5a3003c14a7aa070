"""`check`: is this host as it should be?

May not mend anything: each finding names what does.
"""

from __future__ import annotations

import click

from receiver.cli import checks
from receiver.cli.options import example, json_option


@click.command(epilog=example("check", "check --url https://redox.hospital.example"))
@click.option("--url", metavar="URL", help="Where the world reaches the public listener: looked at from here.")
@json_option
def check(url: str | None, as_json: bool) -> None:
    """Check settings, files, database, keys, credentials, workers, clock and disk, and show the findings of `status`.

    Each line is OK, or names what fixes it. Exit status 1 when a line is BAD.
    """
    checks.report(checks.of_everything(url), as_json=as_json)
