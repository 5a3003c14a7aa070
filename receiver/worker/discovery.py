"""Finds handlers: entry points, which are imported when they are enabled and no sooner, and RECEIVER_HANDLERS modules.

Each plugin is loaded by itself: one that cannot be loaded is reported as a LoadFailure, and the others load. Must not
read the registry or run a handler.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Final

from receiver.errors import ConfigurationError
from receiver.handlers.declaration import Declaration, declared
from receiver.retry_policy import class_name

if TYPE_CHECKING:
    from receiver.storage.registry.changes import HandlerSpec

GROUP: Final = "redox_receiver.handlers"

# Errors whose text names modules, names of code and lines, and nothing else. The text of any other error may quote a
# setting, a password among them: it is for the terminal of the person who runs a command, not for a log.
_TEXT_IS_CODE: Final = (ImportError, SyntaxError, NameError, AttributeError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """An installed entry point, not imported. `origin`: where it comes from, for people."""

    name: str
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A handler or responder, imported. `development`: it comes from a module of RECEIVER_HANDLERS."""

    declaration: Declaration
    function: Callable[..., Any]
    origin: str
    development: bool

    @property
    def spec(self) -> HandlerSpec:
        """What it declares, as it stands in the registry."""
        # Here, for handler processes load handlers too, and have no use for the registry.
        from receiver.storage.registry.changes import HandlerSpec

        said = self.declaration
        return HandlerSpec(
            handler=said.name,
            role=said.role,
            patterns=said.patterns,
            ordering=said.ordering,
            patient_key=said.patient_key,
            acknowledge=said.acknowledge,
            on_failure=said.on_failure,
            max_attempts=said.max_attempts,
            timeout=said.timeout,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadFailure:
    """A plugin that could not be loaded. `handler` is None for a module of RECEIVER_HANDLERS.

    `place`: module:line or file:line of the plugin's code, where there is one. `message`: the whole sentence, for a
    terminal; `summary` is what logs and the database may hold.
    """

    handler: str | None
    origin: str
    error_class: str
    summary: str
    message: str = field(repr=False)
    place: str | None = None


class PluginError(ConfigurationError):
    """A plugin cannot be loaded."""

    def __init__(self, failure: LoadFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True, kw_only=True, slots=True)
class Plugins:
    """What was loaded, by name, and what could not be."""

    loaded: Mapping[str, Loaded]
    failures: tuple[LoadFailure, ...]


def found() -> list[Found]:
    """Every installed entry point, by name."""
    return sorted(
        (Found(name=point.name, origin=_origin(point)) for point in entry_points(group=GROUP)),
        key=lambda each: (each.name, each.origin),
    )


def load_handlers(names: Iterable[str], modules: Sequence[str]) -> Plugins:
    """The handlers of `modules`, and the installed ones among `names`; what is not installed is left out.

    What cannot be loaded is a failure: an import that raises, an entry point that names a handler of another name, and
    two handlers of one name, of which neither is loaded.
    """
    loaded: dict[str, Loaded] = {}
    failures: list[LoadFailure] = []
    ambiguous: set[str] = set()
    ways: list[Callable[[], list[Loaded]]] = [partial(_of_module, module) for module in modules]
    ways += [
        partial(_of_entry_point, point) for name in sorted(set(names)) for point in entry_points(group=GROUP, name=name)
    ]
    for way in ways:
        try:
            members = way()
        except PluginError as exc:
            failures.append(exc.failure)
            continue
        for each in members:
            other = loaded.setdefault(each.declaration.name, each)
            if other.function is not each.function:
                ambiguous.add(each.declaration.name)
                failures.append(
                    _failure(
                        each.declaration.name,
                        each.origin,
                        "DuplicateName",
                        f"two handlers are named {each.declaration.name}: {other.origin} and {each.origin}",
                    )
                )
    return Plugins(
        loaded={name: each for name, each in loaded.items() if name not in ambiguous}, failures=tuple(failures)
    )


def load_handler(name: str, modules: Sequence[str]) -> Loaded:
    """The handler of that name. Raises PluginError when it cannot be loaded, ConfigurationError when there is none."""
    plugins = load_handlers([name], modules)
    if (found := plugins.loaded.get(name)) is not None:
        return found
    failed = [each for each in plugins.failures if each.handler == name]
    # It may stand in a module that cannot be imported.
    failed += [each for each in plugins.failures if each.handler is None]
    if failed:
        raise PluginError(replace(failed[0], handler=name))
    raise ConfigurationError(
        f"there is no handler {name} on this host: install its plugin, or see `redox-receiver handlers list`"
    )


def responder_conflicts(specs: Mapping[str, Iterable[HandlerSpec]]) -> list[tuple[str, str, str]]:
    """Where a destination (the key) has two responders for one query: (responder, destination, the sentence)."""
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
                                f"{query} is answered by both {other} and {spec.handler} at {destination}: run `redox-receiver "
                                f"handlers disable {spec.handler} --destination {destination}`"
                            ),
                        )
                    )
    return conflicts


def _of_module(module: str) -> list[Loaded]:
    origin = f"module {module} of RECEIVER_HANDLERS"
    members = vars(_imported(lambda: import_module(module), None, origin)).values()
    # A function can stand under two names in a module, and come from another one.
    functions = {id(member): (member, said) for member in members if (said := declared(member)) is not None}
    if not functions:
        raise PluginError(_failure(None, origin, "NoHandler", f"{origin}: there is no @handler or @responder in it"))
    return [
        Loaded(declaration=said, function=function, origin=origin, development=True)
        for function, said in functions.values()
    ]


def _of_entry_point(point: EntryPoint) -> list[Loaded]:
    origin = _origin(point)
    function = _imported(point.load, point.name, origin)
    said = declared(function)
    if said is None:
        raise PluginError(
            _failure(point.name, origin, "NoHandler", f"{origin}: that is not a function with @handler or @responder")
        )
    if said.name != point.name:
        raise PluginError(
            _failure(
                point.name,
                origin,
                "Renamed",
                (f"{origin}: it is declared with name={said.name!r}: the two must be the same"),
            )
        )
    return [Loaded(declaration=said, function=function, origin=origin, development=False)]


def _imported(load: Callable[[], Any], name: str | None, origin: str) -> Any:
    try:
        return load()
    except KeyboardInterrupt:
        raise
    except BaseException as exc:
        raise PluginError(_import_failure(exc, name, origin)) from exc


def _import_failure(exc: BaseException, name: str | None, origin: str) -> LoadFailure:
    kind, place = class_name(exc), _place(exc)
    if isinstance(exc, ConfigurationError):
        return _failure(name, origin, kind, f"{origin}: {exc}", place=place)
    # A SyntaxError's text holds the place again.
    text = exc.msg if isinstance(exc, SyntaxError) else str(exc)
    begin = f"{origin} cannot be imported: {kind}"
    end = f" ({place})" if place else ""
    return LoadFailure(
        handler=name,
        origin=origin,
        error_class=kind,
        place=place,
        message=f"{begin}: {text}{end}",
        summary=(f"{begin}: {text}" if isinstance(exc, _TEXT_IS_CODE) else begin) + end,
    )


def _failure(name: str | None, origin: str, kind: str, message: str, *, place: str | None = None) -> LoadFailure:
    """One whose sentence is ours."""
    return LoadFailure(handler=name, origin=origin, error_class=kind, place=place, message=message, summary=message)


def _place(exc: BaseException) -> str | None:
    """Where in the plugin it failed, as module:line; of a file that cannot be read as Python file:line."""
    if isinstance(exc, SyntaxError):
        return f"{exc.filename}:{exc.lineno}" if exc.filename else None
    for frame, line in reversed(list(traceback.walk_tb(exc.__traceback__))):
        module = str(frame.f_globals.get("__name__", "?"))
        if not module.startswith(("importlib", "receiver.handlers")):
            return f"{module}:{line}"
    return None


def _origin(point: EntryPoint) -> str:
    distribution = f" of {point.dist.name} {point.dist.version}" if point.dist is not None else ""
    return f"entry point {point.name} = {point.value}{distribution}"
