"""Handler loader: keeps a worker's handlers as the registry says, and writes their declarations to the registry.

Must not import a plugin into the worker process, nor run a handler. A plugin that cannot be loaded does not stop the
worker: it is reported, and treated as not installed, so that its deliveries wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from typing import Final

import structlog
from sqlalchemy import Engine

from receiver.errors import ReceiverError
from receiver.protocol.registry import Registry
from receiver.storage.queue import maintenance
from receiver.storage.queue.handler_problems import HandlerProblem
from receiver.storage.registry.changes import RegistryChanges
from receiver.worker import discovery
from receiver.worker.discovery import DeclaredHandler, Plugins
from receiver.worker.discovery_process import declared_handlers
from receiver.worker.problem_reporter import ProblemReporter, problem_of_failure

log: Final = structlog.get_logger(__name__)

# Seconds until a plugin that could not be loaded is tried again: you may have installed what it lacked.
_RELOAD_INTERVAL: Final = 30.0


class HandlerLoader:
    """The handlers of one worker. `modules`: RECEIVER_HANDLERS."""

    def __init__(
        self, engine: Engine, changes: RegistryChanges, problems: ProblemReporter, modules: tuple[str, ...]
    ) -> None:
        self._engine = engine
        self._changes = changes
        self._problems = problems
        self._all_modules = modules
        self.modules = modules  # those whose import does not end the process
        self.names: tuple[str, ...] = ()  # the loaded handlers, without responders
        self._plugins: Plugins[DeclaredHandler] | None = None  # the last discovery
        self._version: int | None = None  # the registry version that they were loaded for
        self._reload_at = math.inf  # when to try failed plugins again
        self._refreshed: set[str] = set()  # handlers whose declaration was written to the registry

    def follow(self, registry: Registry | None) -> None:
        """Load newly enabled handlers, and try failed plugins again. Raises SQLAlchemyError."""
        if registry is not None and (registry.version != self._version or time.monotonic() >= self._reload_at):
            self._load(registry)

    def _load(self, registry: Registry) -> None:
        enabled = {each.handler for destination in registry.destinations.values() for each in destination.subscriptions}
        plugins = self._discover(enabled)
        loaded = {name: each for name, each in plugins.loaded.items() if each.development or name in enabled}
        problems = [
            problem_of_failure(each, "plugin_not_loaded", each.handler or each.origin) for each in plugins.failures
        ]
        ended = {each.origin for each in plugins.failures if each.ended}
        self.modules = tuple(each for each in self._all_modules if discovery.module_origin(each) not in ended)
        failed = {each.handler for each in problems}
        for name in sorted(enabled - loaded.keys() - failed):
            log.warning("handler.not_installed", handler=name)
        problems += _conflicts(registry, loaded)
        bindings = self._development_bindings(loaded)
        for each in loaded.values():
            problems += self._register(each, bindings)
        for problem in problems:
            log.error(
                "handler.not_loaded",
                handler=problem.handler,
                destination=problem.destination or None,
                error_class=problem.error_class,
                error=problem.detail,
            )
        self._problems.replace_all("plugin_not_loaded", problems)
        self._reload_at = time.monotonic() + _RELOAD_INTERVAL if problems else math.inf
        self._version = registry.version
        self.names = tuple(sorted(name for name, each in loaded.items() if each.declaration.role == "handler"))

    def _discover(self, enabled: AbstractSet[str]) -> Plugins[DeclaredHandler]:
        """Return the plugins. They are imported again if one was missing, not after every change of the registry."""
        found = self._plugins
        if found is None or found.failures or not enabled <= found.loaded.keys():
            found = self._plugins = declared_handlers(enabled, self._all_modules)
        return found

    def _development_bindings(self, loaded: Mapping[str, DeclaredHandler]) -> Mapping[str, set[str]]:
        """Return the handlers that were ever bound to each development destination."""
        if not any(each.development for each in loaded.values()):
            return {}
        with self._engine.connect() as connection:
            return maintenance.development_bindings(connection)

    def _register(self, each: DeclaredHandler, bindings: Mapping[str, set[str]]) -> list[HandlerProblem]:
        """Bind the handlers of RECEIVER_HANDLERS to development destinations, once, and store the handler's
        declaration.

        If the registry refuses the declaration, this is a problem of this handler only.
        """
        name, problems = each.declaration.name, []
        for destination, names in bindings.items():
            if each.development and name not in names:
                try:
                    self._changes.enable_handler(destination, each.spec, datetime.now(UTC))
                except ReceiverError as exc:
                    problems.append(_conflict(name, destination, f"{name} ({each.origin}): {exc}"))
        # Only once, not at each change: two workers with different versions of a plugin would overwrite each other
        # forever.
        if name not in self._refreshed:
            try:
                self._changes.refresh_handlers([each.spec], datetime.now(UTC))
                self._refreshed.add(name)
            except ReceiverError as exc:
                problems.append(_conflict(name, "", f"{name} ({each.origin}): {exc}"))
        return problems


def _conflicts(registry: Registry, loaded: Mapping[str, DeclaredHandler]) -> list[HandlerProblem]:
    """Return the destinations with two responders for one query, as problems."""
    specs = {
        destination.name: [loaded[each.handler].spec for each in destination.subscriptions if each.handler in loaded]
        for destination in registry.destinations.values()
    }
    return [
        _conflict(handler, destination, sentence)
        for handler, destination, sentence in discovery.responder_conflicts(specs)
    ]


def _conflict(handler: str, destination: str, sentence: str) -> HandlerProblem:
    """Make the HandlerProblem for a declaration that the registry refuses."""
    return HandlerProblem(
        kind="plugin_not_loaded", handler=handler, destination=destination, error_class="Conflict", detail=sentence
    )
