"""The command line of the fault suite: the rounds alone, or everything, and what came of it as a report.

`./tests/faults/run` calls it. The exit status is 1 when anything was violated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from tests.faults import clocks, floods, hosts, proxied, recovery, rounds, soak
from tests.faults.mishaps import MISHAPS
from tests.faults.report import REPORT, Section, Tell, renewed, report

# Every part of the suite that has a chapter in the report, in its order.
SECTIONS: Final[tuple[Callable[[Tell], Section], ...]] = (
    rounds.measure,
    recovery.measure,
    hosts.measure,
    clocks.measure,
    floods.measure,
    proxied.measure,
    soak.measure,
)


def say(line: str) -> None:
    """To whoever watches, at once."""
    print(line, flush=True)


def run(measures: Sequence[Callable[[Tell], Section]], tell: Tell) -> Iterator[Section]:
    """The sections; one that does not come to its end is told as what it is, and is no reason to skip the others."""
    for measure in measures:
        try:
            yield measure(tell)
        except Exception as exc:  # noqa: BLE001 - hours of the others are not lost for it
            module = getattr(measure, "func", measure).__module__
            yield Section(
                title=module.rpartition(".")[2].capitalize(),
                command=f"python -m {module}",
                text="It did not come to its end.",
                violations=[f"{type(exc).__name__}: {exc}"],
            )


def _name(measure: Callable[[Tell], Section]) -> str:
    return measure.__module__.rpartition(".")[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 when nothing was violated."""
    parser = argparse.ArgumentParser(
        prog="tests/faults/run",
        description="Let things happen to a receiver under load, and look whether everything is as if they had not.",
    )
    parser.add_argument("--rounds", type=int, default=len(MISHAPS), metavar="N", help="default: every mishap once")
    parser.add_argument("--seed", type=int, metavar="N", help="default: a new one, which is printed")
    names = [each.__name__ for each in MISHAPS]
    parser.add_argument(
        "--only",
        action="append",
        choices=names,
        metavar="MISHAP",
        help=f"let nothing else happen; may be repeated: {', '.join(names)}",
    )
    parser.add_argument(
        "--report", action="store_true", help=f"run every other part of the suite too, and write {REPORT.name}"
    )
    parser.add_argument(
        "--renew",
        choices=[_name(each) for each in SECTIONS],
        metavar="PART",
        help=f"run that part alone, and put its chapter in the place of the one in {REPORT.name}: "
        f"{', '.join(map(_name, SECTIONS))}",
    )
    parser.add_argument(
        "--flood",
        type=float,
        default=floods.SECONDS,
        metavar="SECONDS",
        help="of the report: each flood; default: %(default)g",
    )
    parser.add_argument(
        "--burst",
        type=int,
        default=floods.BURST,
        metavar="N",
        help="of the report: messages of the burst; default: %(default)d",
    )
    parser.add_argument(
        "--soak", type=float, default=soak.MINUTES, metavar="MINUTES", help="of the report; default: %(default)g"
    )
    options = parser.parse_args(arguments)
    first = partial(
        rounds.measure,
        rounds=options.rounds,
        seed=options.seed,
        mishaps=[each for each in MISHAPS if not options.only or each.__name__ in options.only],
    )
    given: dict[Callable[..., Section], Callable[[Tell], Section]] = {
        rounds.measure: first,
        soak.measure: partial(soak.measure, minutes=options.soak),
        floods.measure: partial(floods.measure, seconds=options.flood, messages=options.burst),
    }
    parts = (
        [each for each in SECTIONS if _name(each) == options.renew]
        if options.renew
        else (SECTIONS if options.report else SECTIONS[:1])
    )
    command = " ".join(["./tests/faults/run", *(sys.argv[1:] if arguments is None else arguments)])
    sections: list[Section] = []
    for section in run([given.get(each, each) for each in parts], say):
        sections.append(section)
        for told in section.violations:
            say(f"VIOLATED {told}")
        if options.renew:
            REPORT.write_text(renewed(REPORT.read_text(), section))
        elif options.report:  # after each, for the whole takes long
            REPORT.write_text(report(sections, command, missing=[_name(each) for each in parts[len(sections) :]]))
    violated = any(section.violations for section in sections)
    say("not as it should be" if violated else "all as it should be")
    return 1 if violated else 0


if __name__ == "__main__":
    sys.exit(main())
