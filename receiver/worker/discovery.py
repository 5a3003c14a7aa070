"""Plugin discovery: loads handlers from entry points and from the modules of RECEIVER_HANDLERS.

An entry point is imported only after its handler is enabled. Each plugin is loaded separately: if one cannot be loaded,
it is reported as a LoadFailure and the others load. Must not read the registry or run a handler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from receiver.errors import ConfigurationError
from receiver.handlers.declaration import Declaration, declared
from receiver.worker.load_failure import LoadFailure, PluginError, failure_of, import_failure

if TYPE_CHECKING:
    from receiver.storage.registry.handler_changes import HandlerSpec

GROUP: Final = "redox_receiver.handlers"


@dataclass(frozen=True, kw_only=True, slots=True)
class InstalledHandler:
    """An installed entry point, not imported. `origin`: the package and object it refers to, for display."""

    name: str
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DeclaredHandler:
    """A handler or responder whose plugin can be imported. `development`: from a module of RECEIVER_HANDLERS."""

    declaration: Declaration
    origin: str
    development: bool

    @property
    def spec(self) -> HandlerSpec:
        """The declaration as the registry stores it."""
        # Imported here because handler processes also load handlers and do not need the registry.
        from receiver.storage.registry.handler_changes import HandlerSpec

        declaration = self.declaration
        return HandlerSpec(
            handler=declaration.name,
            role=declaration.role,
            patterns=declaration.patterns,
            ordering=declaration.ordering,
            patient_key=declaration.patient_key,
            acknowledge=declaration.acknowledge,
            on_failure=declaration.on_failure,
            max_attempts=declaration.max_attempts,
            timeout=declaration.timeout,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedHandler(DeclaredHandler):
    """An imported handler or responder."""

    function: Callable[..., Any]


_Handler_co = TypeVar("_Handler_co", bound=DeclaredHandler, covariant=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plugins(Generic[_Handler_co]):
    """The result of loading: the handlers by name, and the failures."""

    loaded: Mapping[str, _Handler_co]
    failures: tuple[LoadFailure, ...]


def found() -> list[InstalledHandler]:
    """Return all installed entry points, sorted by name."""
    return sorted(
        (InstalledHandler(name=point.name, origin=_origin(point)) for point in entry_points(group=GROUP)),
        key=lambda each: (each.name, each.origin),
    )


def search_path() -> tuple[str, ...]:
    """Return Python's module search path, for a process in another directory."""
    return tuple(str(Path(entry).resolve()) for entry in sys.path)


def load_handlers(
    names: Iterable[str],
    modules: Sequence[str],
    *,
    skip: Collection[str] = (),
    before: Callable[[str | None, str], object] = lambda _name, _origin: None,
) -> Plugins[LoadedHandler]:
    """Load the handlers of `modules` and the installed handlers in `names`. Names that are not installed are skipped.

    These are failures: an import that raises; an entry point whose handler has a different name; two handlers with the
    same name (neither is loaded). `skip`: origins of plugins that are not imported. `before` is called before each
    import, with the handler's name (None for a module) and its origin.
    """
    loaded: dict[str, LoadedHandler] = {}
    failures: list[LoadFailure] = []
    ambiguous: set[str] = set()
    plugins: list[tuple[str | None, str, Callable[[], list[LoadedHandler]]]] = [
        (None, module_origin(module), partial(_of_module, module)) for module in modules
    ]
    plugins += [
        (name, _origin(point), partial(_of_entry_point, point))
        for name in sorted(set(names))
        for point in entry_points(group=GROUP, name=name)
    ]
    for name, origin, load in plugins:
        if origin in skip:
            continue
        before(name, origin)
        try:
            members = load()
        except PluginError as exc:
            failures.append(exc.failure)
            continue
        for each in members:
            other = loaded.setdefault(each.declaration.name, each)
            if other.function is not each.function:
                ambiguous.add(each.declaration.name)
                failures.append(
                    failure_of(
                        each.declaration.name,
                        each.origin,
                        "DuplicateName",
                        f"two handlers are named {each.declaration.name}: {other.origin} and {each.origin}",
                    )
                )
    return Plugins(
        loaded={name: each for name, each in loaded.items() if name not in ambiguous}, failures=tuple(failures)
    )


def load_handler(name: str, modules: Sequence[str]) -> LoadedHandler:
    """Load one handler. Raises PluginError if it cannot be loaded, ConfigurationError if it is not installed."""
    return require(name, load_handlers([name], modules))


def require(name: str, plugins: Plugins[_Handler_co]) -> _Handler_co:
    """Return the handler. Raises PluginError if it could not be loaded, ConfigurationError if it is not installed."""
    if (found := plugins.loaded.get(name)) is not None:
        return found
    failed = [each for each in plugins.failures if each.handler == name]
    # The handler may be in a module that cannot be imported.
    failed += [each for each in plugins.failures if each.handler is None]
    if failed:
        raise PluginError(replace(failed[0], handler=name))
    raise ConfigurationError(
        f"handler {name} is not installed on this host: install its plugin, or run `redox-receiver handlers list`"
    )


def responder_conflicts(specs: Mapping[str, Iterable[HandlerSpec]]) -> list[tuple[str, str, str]]:
    """Find destinations (the keys) with two responders for one query. Returns (responder, destination, message)."""
    conflicts = []
    for destination, bound in specs.items():
        answerers: dict[str, str] = {}
        for spec in bound:
            for query in spec.patterns if spec.role == "responder" else ():
                other = answerers.setdefault(query, spec.handler)
                if other != spec.handler:
                    conflicts.append(
                        (
                            spec.handler,
                            destination,
                            (
                                f"{query} is answered by both {other} and {spec.handler} at {destination}: "
                                f"run `redox-receiver handlers disable {spec.handler} --destination {destination}`"
                            ),
                        )
                    )
    return conflicts


def _of_module(module: str) -> list[LoadedHandler]:
    origin = module_origin(module)
    members = vars(_imported(lambda: import_module(module), None, origin)).values()
    # A function can have two names in a module, and can be imported from another module.
    functions = {
        id(member): (member, declaration) for member in members if (declaration := declared(member)) is not None
    }
    if not functions:
        raise PluginError(
            failure_of(
                None, origin, "NoHandler", f"{origin}: the module contains no function with @handler or @responder"
            )
        )
    return [
        LoadedHandler(declaration=declaration, function=function, origin=origin, development=True)
        for function, declaration in functions.values()
    ]


def _of_entry_point(point: EntryPoint) -> list[LoadedHandler]:
    origin = _origin(point)
    function = _imported(point.load, point.name, origin)
    declaration = declared(function)
    if declaration is None:
        raise PluginError(
            failure_of(
                point.name, origin, "NoHandler", f"{origin}: the object is not a function with @handler or @responder"
            )
        )
    if declaration.name != point.name:
        raise PluginError(
            failure_of(
                point.name,
                origin,
                "Renamed",
                (f"{origin}: the function is declared with name={declaration.name!r}: use the same name"),
            )
        )
    return [LoadedHandler(declaration=declaration, function=function, origin=origin, development=False)]


def _imported(load: Callable[[], Any], name: str | None, origin: str) -> Any:
    try:
        return load()
    except KeyboardInterrupt:
        raise
    except BaseException as exc:
        raise PluginError(import_failure(exc, name, origin)) from exc


def _origin(point: EntryPoint) -> str:
    distribution = f" of {point.dist.name} {point.dist.version}" if point.dist is not None else ""
    return f"entry point {point.name} = {point.value}{distribution}"


def module_origin(module: str) -> str:
    """Return the origin of the handlers of a module, for display."""
    return f"module {module} of RECEIVER_HANDLERS"
