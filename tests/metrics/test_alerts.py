"""The alert rules and the dashboard: every metric and runbook section that they name exists, and every alert fires."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import pytest
from sqlalchemy import Engine

from receiver.cli import main
from receiver.findings.codes import CODES
from receiver.findings.gauges import gauges
from receiver.keyring import Keyring
from receiver.metrics.counters import REGISTRY

DEPLOY: Final = Path(__file__).resolve().parents[2] / "deploy"
RULES: Final = (DEPLOY / "prometheus-rules.yml").read_text()
DASHBOARD: Final = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
PROMTOOL: Final = shutil.which("promtool")
needs_promtool: Final = pytest.mark.skipif(PROMTOOL is None, reason="promtool is missing (on Debian: prometheus)")
_METRIC: Final = re.compile(r"redox_receiver_[a-z_]+")


@dataclass(frozen=True, kw_only=True)
class Case:
    """An alert, the series that fire it, as {series: values}, the minutes until it fires, and its labels then."""

    alert: str
    series: dict[str, str]
    minutes: int
    labels: dict[str, str]


def named(name: str, **labels: str) -> str:
    """A series as Prometheus writes it."""
    return f"redox_receiver_{name}{{" + ", ".join(f'{key}="{value}"' for key, value in labels.items()) + "}"


LAB: Final = {"destination": "lab"}
BOTH: Final = {"destination": "lab", "handler": "register"}
CASES: Final = [
    Case(alert="FeedPaused", series={named("feed_probably_paused", **LAB): "1x60"}, minutes=2, labels=LAB),
    Case(
        alert="RequestsUnavailable",
        series={named("requests_total", **LAB, outcome="unavailable", reason="timed_out"): "0+1x60"},
        minutes=10,
        labels={"reason": "timed_out"},
    ),
    Case(
        alert="DatabaseDown",
        series={named("database_up", instance="one"): "0x60"},
        minutes=2,
        labels={"instance": "one"},
    ),
    Case(
        alert="NoReceiver",
        series={named("findings", code="no_receiver"): "1x60"},
        minutes=2,
        labels={"code": "no_receiver"},
    ),
    Case(alert="NoWorker", series={named("findings", code="no_worker"): "1x60"}, minutes=3, labels={}),
    Case(
        alert="OldestPending",
        series={named("oldest_pending_timestamp_seconds", **BOTH): "0x60"},
        minutes=10,
        labels=BOTH,
    ),
    Case(alert="LaneHeld", series={named("held_lanes", **LAB): "1x60"}, minutes=1, labels=LAB),
    Case(alert="HandlerPaused", series={named("paused_handlers", **BOTH): "1x60"}, minutes=11, labels=BOTH),
    Case(alert="DeadDeliveries", series={named("dead_deliveries", **BOTH): "3x60"}, minutes=1, labels=BOTH),
    Case(alert="Refusals", series={named("findings", code="requests_refused", **LAB): "1x60"}, minutes=6, labels=LAB),
    Case(alert="Quarantined", series={named("quarantined_messages", **LAB): "2x60"}, minutes=16, labels=LAB),
    Case(alert="QuietFeed", series={named("findings", code="feed_silent", **LAB): "1x60"}, minutes=6, labels=LAB),
    Case(
        alert="QuietSource",
        series={named("source_last_message_timestamp_seconds", **LAB, source="s"): "0x2000"},
        minutes=1500,
        labels=LAB | {"source": "s"},
    ),
    Case(
        alert="CredentialEnding",
        series={named("credential_expires_timestamp_seconds", **LAB, kind="token", credential="7"): "86400x60"},
        minutes=1,
        labels=LAB | {"kind": "token", "credential": "7"},
    ),
    Case(
        alert="JwksStale",
        series={named("findings", code="key_set_stale", **LAB): "1x60"},
        minutes=6,
        labels=LAB | {"code": "key_set_stale"},
    ),
    Case(
        alert="OutboxStuck",
        series={named("outbox_problems", api_key="main", state="dead", error_class="E"): "1x60"},
        minutes=11,
        labels={"api_key": "main", "state": "dead"},
    ),
    Case(
        alert="ClockWrong",
        series={named("findings", code="clock", instance="one"): "1x60"},
        minutes=6,
        labels={"instance": "one"},
    ),
    Case(
        alert="RegistryChangedOutside",
        series={named("findings", code="registry_row_changed"): "1x60"},
        minutes=1,
        labels={"code": "registry_row_changed"},
    ),
    Case(
        alert="DiskLow",
        series={named("disk_free_bytes", instance="one"): "1000000000x60"},
        minutes=6,
        labels={"instance": "one"},
    ),
]


def blocks() -> Iterator[tuple[str, str]]:
    """Yield (alert, its text) of the rules."""
    parts = re.split(r"(?m)^ +- alert: (\w+)\n", RULES)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def test_every_alert_has_a_case() -> None:
    """An alert that no test fires may never fire."""
    assert sorted(case.alert for case in CASES) == sorted(alert for alert, _ in blocks())


def promtool(*arguments: str) -> str:
    """Run promtool. Returns what it prints."""
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_the_rules_are_valid() -> None:
    """As Prometheus reads them."""
    assert f"{len(CASES)} rules found" in promtool("check", "rules", str(DEPLOY / "prometheus-rules.yml"))


@needs_promtool
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_an_alert_fires(case: Case, tmp_path: Path) -> None:
    """For these series, with these labels, and not at the first minute without them."""
    (tmp_path / "rules.yml").write_text(RULES)
    annotations = _annotations(case)
    severity = re.search(r"severity: (\w+)", dict(blocks())[case.alert])
    assert severity is not None
    expected = [{"exp_labels": case.labels | {"severity": severity[1]}, "exp_annotations": annotations}]
    at = f"{case.minutes}m"

    def check(series: dict[str, str], found: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "alert_rule_test": [{"eval_time": at, "alertname": case.alert, "exp_alerts": found}],
        }

    quiet = dict.fromkeys(case.series, "0+0x2000") if case.alert in _ZERO_IS_QUIET else {}
    document = {
        "rule_files": [str(tmp_path / "rules.yml")],
        "evaluation_interval": "1m",
        "tests": [check(case.series, expected), check(quiet, [])],
    }
    (tmp_path / "test.yml").write_text(json.dumps(document))
    promtool("test", "rules", str(tmp_path / "test.yml"))


_ZERO_IS_QUIET: Final = frozenset(
    {"FeedPaused", "RequestsUnavailable", "NoReceiver", "NoWorker", "LaneHeld", "Refusals", "Quarantined", "QuietFeed"}
)


def _annotations(case: Case) -> dict[str, str]:
    """Return the annotations with the labels of the case in place; values are computed by hand where they show."""
    text = dict(blocks())[case.alert]
    values = {
        "OldestPending": "10m 0s",
        "QuietSource": "1d 1h 0m 0s",
        "CredentialEnding": "23h 59m 0s",
        "DiskLow": "953.7Mi",
    }
    numbers = {"LaneHeld": "1", "DeadDeliveries": "3", "Quarantined": "2"}
    found = {}
    for name in ("summary", "fix", "runbook"):
        line = re.search(rf"(?m)^ +{name}: (.*)$", text)
        assert line is not None, (case.alert, name)
        value = line[1].strip().strip('"')
        for label, shown in case.labels.items():
            value = value.replace(f"{{{{ $labels.{label} }}}}", shown)
        value = re.sub(r"\{\{ \$value \| \w+ \}\}", values.get(case.alert, ""), value)
        found[name] = value.replace("{{ $value }}", numbers.get(case.alert, ""))
    return found


def test_every_metric_that_is_named_exists(engine: Engine, keyring: Keyring, tmp_path: Path) -> None:
    """In the rules and in the dashboard: nothing watches a metric that nobody serves."""
    with engine.connect() as connection:
        served = {metric.name for metric in gauges(connection, keyring, tmp_path)}
    for metric in REGISTRY.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(metric.type, ("",))
        served |= {metric.name + suffix for suffix in suffixes}
    served.add("redox_receiver_database_up")
    named_here = set(_METRIC.findall(RULES)) | set(_METRIC.findall(json.dumps(DASHBOARD)))
    assert named_here - served == set()
    assert named_here


def test_every_code_that_is_named_exists() -> None:
    """The codes of findings that alerts select by."""
    for codes in re.findall(r'code=~?"([a-z_|]+)"', RULES):
        assert set(codes.split("|")) <= CODES.keys()


@pytest.mark.parametrize(("alert", "text"), list(blocks()), ids=[alert for alert, _ in blocks()])
def test_an_alert_says_what_to_do(alert: str, text: str) -> None:
    """Its command exists, with its options, and its section stands in the runbook."""
    fix = re.search(r"(?m)^ +fix: redox-receiver (.*)$", text)
    assert fix is not None
    words = fix[1].split()
    command: click.Command = main
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), words.pop(0))
        assert found is not None, fix[1]
        command = found
    options = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options
    section = re.search(r"(?m)^ +runbook: deploy/OPERATING.md, (.*)$", text)
    assert section is not None
    assert re.search(rf"(?m)^##+ {re.escape(section[1])}$", (DEPLOY / "OPERATING.md").read_text())
