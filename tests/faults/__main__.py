"""The command line of the fault suite: the rounds alone, one part, or all parts with a report.

`./tests/faults/run` calls it. The exit status is 1 if there was a violation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from tests.faults import clocks, floods, hosts, proxied, recovery, rounds, soak
from tests.faults.faults import FAULTS
from tests.faults.report import REPORT, Progress, Section, replace_section, report

Measure = Callable[[Progress], Section]

# The parts of the suite, in the order of their chapters in the report.
PARTS: Final[tuple[Measure, ...]] = (
    rounds.measure,
    recovery.measure,
    hosts.measure,
    clocks.measure,
    floods.measure,
    proxied.measure,
    soak.measure,
)


def show(line: str) -> None:
    """Print a line of progress at once."""
    print(line, flush=True)


def run(measures: Sequence[Measure], progress: Progress) -> Iterator[Section]:
    """Run the parts. A part that raises an error becomes a section with a violation, and the next part runs."""
    for measure in measures:
        try:
            yield measure(progress)
        except Exception as exc:  # noqa: BLE001 - keep the results of the other parts
            module = getattr(measure, "func", measure).__module__
            yield Section(
                title=module.rpartition(".")[2].capitalize(),
                command=f"python -m {module}",
                text="This part ended with an error.",
                violations=[f"{type(exc).__name__}: {exc}"],
            )


def _name(measure: Measure) -> str:
    return measure.__module__.rpartition(".")[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite. Returns the exit status: 0 if there was no violation."""
    options = _parse(arguments)
    rounds_part = partial(
        rounds.measure,
        rounds=options.rounds,
        seed=options.seed,
        faults=[each for each in FAULTS if not options.only or each.__name__ in options.only],
    )
    configured: dict[Callable[..., Section], Measure] = {
        rounds.measure: rounds_part,
        soak.measure: partial(soak.measure, minutes=options.soak),
        floods.measure: partial(floods.measure, seconds=options.flood, messages=options.burst),
    }
    parts = (
        [each for each in PARTS if _name(each) == options.renew]
        if options.renew
        else (PARTS if options.report else PARTS[:1])
    )
    command = " ".join(["./tests/faults/run", *(sys.argv[1:] if arguments is None else arguments)])
    sections: list[Section] = []
    for section in run([configured.get(each, each) for each in parts], show):
        sections.append(section)
        for violation in section.violations:
            show(f"VIOLATION {violation}")
        if options.renew:
            REPORT.write_text(replace_section(REPORT.read_text(), section))
        elif options.report:  # after each part: the whole run takes long
            REPORT.write_text(report(sections, command, missing=[_name(each) for each in parts[len(sections) :]]))
    failed = any(section.violations for section in sections)
    show("there were violations" if failed else "no violations")
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests/faults/run",
        description="Inject faults into a receiver under load. Check that nothing was lost, duplicated or reordered.",
    )
    parser.add_argument("--rounds", type=int, default=len(FAULTS), metavar="N", help="Default: each fault once.")
    parser.add_argument("--seed", type=int, metavar="N", help="Default: a random seed, which is printed.")
    faults = [each.__name__ for each in FAULTS]
    parser.add_argument(
        "--only",
        action="append",
        choices=faults,
        metavar="FAULT",
        help=f"Inject only this fault. May be repeated. One of: {', '.join(faults)}.",
    )
    parser.add_argument("--report", action="store_true", help=f"Run all parts of the suite, and write {REPORT.name}.")
    parser.add_argument(
        "--renew",
        choices=[_name(each) for each in PARTS],
        metavar="PART",
        help=f"Run one part, and replace its chapter in {REPORT.name}. One of: {', '.join(map(_name, PARTS))}.",
    )
    parser.add_argument(
        "--flood",
        type=float,
        default=floods.SECONDS,
        metavar="SECONDS",
        help="With --report or --renew: duration of each flood. Default: %(default)g.",
    )
    parser.add_argument(
        "--burst",
        type=int,
        default=floods.BURST,
        metavar="N",
        help="With --report or --renew: messages in the burst. Default: %(default)d.",
    )
    parser.add_argument(
        "--soak",
        type=float,
        default=soak.MINUTES,
        metavar="MINUTES",
        help="With --report or --renew: duration of the soak test. Default: %(default)g.",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
