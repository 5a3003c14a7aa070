"""How many messages a second gunicorn accepts with `deploy/gunicorn.conf.py`, by processes and threads.

Run it as `python -m tests.bench.serving`. wrk sends valid messages of 4 KB, each with its own id, over 64 connections.
The embedded PostgreSQL is durable. All combinations are measured in turn, round after round. It prints the medians of
answers a second, milliseconds until the answer, and milliseconds of CPU (gunicorn and PostgreSQL) for each message. It
checks only that messages answered 200 are stored, and no speed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence

from tests.bench.bodies import of_size
from tests.bench.targets import ROOT, Receiver, Server, Workbench, await_answer

CONNECTIONS = 64
Figures = tuple[float, float, float, float]


def gunicorn(receiver: Receiver, processes: int, threads: int) -> Server:
    """Return gunicorn as an operator starts it."""
    return Server(
        lambda fd: [
            sys.executable,
            "-P",
            "-m",
            "gunicorn",
            "-c",
            str(ROOT / "deploy" / "gunicorn.conf.py"),
            "--bind",
            f"fd://{fd}",
        ],
        receiver.environment
        | {"RECEIVER_RECEIVERS": str(processes), "RECEIVER_THREADS": str(threads), "RECEIVER_RESPONDERS": "1"},
        receiver.root / f"gunicorn-{processes}-{threads}.log",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a line for each combination."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.serving", description=__doc__)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--threads", default="4,16,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args(arguments)
    grid = [
        (int(processes), int(threads))
        for processes in options.processes.split(",")
        for threads in options.threads.split(",")
    ]
    found: defaultdict[tuple[int, int], list[Figures]] = defaultdict(list)
    with Workbench() as workbench:
        for _ in range(options.rounds):
            for processes, threads in grid:
                with gunicorn(workbench.receiver, processes, threads) as server:
                    target = workbench.receiver.target("gunicorn", server)
                    await_answer(target)
                    kept, cpu = workbench.receiver.kept(), target.cpu_seconds() + workbench.database_cpu()
                    sent = target.closed_loop(of_size("4 KB"), connections=CONNECTIONS, seconds=options.seconds)
                    cpu = target.cpu_seconds() + workbench.database_cpu() - cpu
                    kept = workbench.receiver.kept() - kept
                if sent.wrong or sent.broken or kept < sent.answered:
                    print(f"{processes} x {threads}: {sent}, kept {kept}")
                    return 1
                found[processes, threads].append((sent.rate, sent.p50 * 1e3, sent.p99 * 1e3, cpu / kept * 1e3))
    print("processes threads  messages/s  p50 ms  p99 ms  CPU ms/message")
    for (processes, threads), figures in found.items():
        rate, p50, p99, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"{processes:9} {threads:7}  {rate:10.0f}  {p50:6.1f}  {p99:6.1f}  {cpu:14.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
