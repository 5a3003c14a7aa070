"""The exposition of all metrics in Prometheus' text format: the counters of all processes of this host, and the gauges.

Must not fail as a whole when the database does not answer: the counters are served all the same, and
`redox_receiver_database_up` is 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from receiver.metrics.directory import VARIABLE

log: Final = structlog.get_logger(__name__)

MEDIA_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class _Gauges(Collector):
    def __init__(self, read: Callable[[], Sequence[Metric] | None]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        found = self._read()
        up = GaugeMetricFamily(
            "redox_receiver_database_up", "1: the database answered the queries behind the gauges in time."
        )
        up.add_metric([], float(found is not None))
        yield up
        yield from found or ()

    def describe(self) -> Iterable[Metric]:
        return []


def exposition(read: Callable[[], Sequence[Metric] | None]) -> bytes:
    """Return all metrics. `read` returns the gauges; None when the database does not answer."""
    registry = CollectorRegistry()
    if os.environ.get(VARIABLE):
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    registry.register(_Gauges(read))
    return generate_latest(registry)
