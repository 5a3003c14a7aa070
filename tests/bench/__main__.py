"""Compare this receiver with others on this machine. ./tests/bench/run prepares the environment and runs this.

Prints goals and results, and fails for no speed. The exit status is 1 when a request went wrong, or a message that was
answered 200 is not stored: then the figures are invalid.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from receiver.database.embedded.binaries import binaries
from tests.bench import machine, report
from tests.bench.bodies import SIZES
from tests.bench.measure import Bench, Plan
from tests.bench.targets import NAMES, NODE, Workbench

PARTS = ("closed", "refused", "open", "memory")
CONNECTIONS = (1, 16, 64)
RATES = (300, 1_000)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    options = _options().parse_args(arguments)
    if shutil.which("wrk") is None:
        print("!! NOT HERE: wrk. Nothing is measured.", file=sys.stderr)
        return 0
    plan = _plan(options)
    versions = machine.describe(_versions())
    began = datetime.now(UTC)
    with Workbench() as workbench:
        results = Bench(
            workbench, plan, lambda line: print(f"{datetime.now(UTC):%H:%M:%S} {line}", file=sys.stderr)
        ).run()
    if options.json is not None:
        document = {
            "began": began.isoformat(),
            "ended": datetime.now(UTC).isoformat(),
            "versions": versions,
            **results.as_json(),
            "goals": [
                {"says": each.says, "bound": each.bound, "reached": each.reached, "verdict": each.verdict}
                for each in report.goals(results)
            ],
        }
        options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    if options.readme:
        print(report.markdown(results, versions))
    else:
        print(f"{', '.join(f'{name} {value}' for name, value in versions.items())}\n{report.tables(results)}")
    return 1 if results.faults else 0


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./tests/bench/run",
        description=(__doc__ or "").partition(":")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        choices=(*NAMES, *PARTS),
        default=(),
        help=f"these targets ({', '.join(NAMES)}) and these parts ({', '.join(PARTS)}) alone",
    )
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of each measurement (3)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of all of them (3)")
    parser.add_argument("--short", action="store_true", help="a minute or so, to see that it works: worth no figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found")
    parser.add_argument(
        "--readme", action="store_true", help="print the Markdown tables of deploy/PERFORMANCE.md instead"
    )
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    targets = [name for name in NAMES if name in options.only] or NAMES
    parts = [name for name in PARTS if name in options.only] or PARTS
    if options.short:
        return Plan(
            targets=targets,
            parts=parts,
            cases=[("4 KB", 16), ("1 MB", 4)],
            rates=[300],
            rounds=1,
            seconds=1.0,
            messages=500,
            largest=(1,),
        )
    return Plan(
        targets=targets,
        parts=parts,
        cases=[(size, each) for size in SIZES for each in CONNECTIONS],
        rates=RATES,
        rounds=options.rounds,
        seconds=options.seconds,
        messages=100_000,
        largest=(1, 4),
    )


def _versions() -> list[tuple[str, str]]:
    """Return name and version of each program that takes part."""
    found = [
        (name, importlib.metadata.version(name))
        for name in ("gunicorn", "uvicorn", "httptools", "uvloop", "Flask", "SQLAlchemy", "psycopg")
    ]
    found.append(("PostgreSQL", _output_of(str(binaries() / "postgres"), "--version").split()[2]))
    locked = json.loads((NODE / "package-lock.json").read_text())["packages"]
    if shutil.which("node"):
        found.append(("Node", _output_of("node", "--version").removeprefix("v")))
        found += [(name, locked[f"node_modules/{name}"]["version"]) for name in ("express", "fastify", "pg")]
    return found


def _output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
