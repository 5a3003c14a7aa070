"""Finds handlers: entry points, which are imported when they are enabled and no sooner, and RECEIVER_HANDLERS modules.

May not read the registry or run a handler. All mistakes are ConfigurationErrors that name the plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Final

from receiver.errors import ConfigurationError
from receiver.handlers.declaration import Declaration, declared

if TYPE_CHECKING:
    from receiver.storage.registration import HandlerSpec

GROUP: Final = "redox_receiver.handlers"


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
        from receiver.storage.registration import HandlerSpec

        said = self.declaration
        return HandlerSpec(
            handler=said.name, role=said.role, patterns=said.patterns, ordering=said.ordering,
            patient_key=said.patient_key, acknowledge=said.acknowledge, on_failure=said.on_failure,
            max_attempts=said.max_attempts, timeout=said.timeout)


def found() -> list[Found]:
    """Every installed entry point, by name."""
    return sorted((Found(name=point.name, origin=_origin(point)) for point in entry_points(group=GROUP)),
                  key=lambda each: (each.name, each.origin))


def load(names: Iterable[str], modules: Sequence[str]) -> dict[str, Loaded]:
    """The handlers of `modules`, and the installed ones among `names`, by name; what is not installed is left out.

    Raises ConfigurationError: one that cannot be imported, two of one name, an entry point that names another one.
    """
    loaded: dict[str, Loaded] = {}
    for module in modules:
        for each in _of_module(module):
            _add(loaded, each)
    for name in sorted(set(names)):
        for point in entry_points(group=GROUP, name=name):
            _add(loaded, _of_entry_point(point))
    return loaded


def load_one(name: str, modules: Sequence[str]) -> Loaded:
    """The one of that name. Raises ConfigurationError, also when there is none."""
    try:
        return load([name], modules)[name]
    except KeyError:
        raise ConfigurationError(f"there is no handler {name} on this host: install its plugin, or see "
                                 "`redox-receiver handlers list`") from None


def check_responders(specs: Mapping[str, Iterable[HandlerSpec]]) -> None:
    """Raise ConfigurationError where a destination (the key) has two responders for one query, naming both."""
    for destination, bound in specs.items():
        answerers: dict[str, str] = {}
        for spec in bound:
            for query in spec.patterns if spec.role == "responder" else ():
                other = answerers.setdefault(query, spec.handler)
                if other != spec.handler:
                    raise ConfigurationError(
                        f"{query} is answered by both {other} and {spec.handler} at {destination}: run `redox-receiver "
                        f"handlers disable {spec.handler} --destination {destination}`")


def _add(loaded: dict[str, Loaded], one: Loaded) -> None:
    other = loaded.setdefault(one.declaration.name, one)
    if other.function is not one.function:
        raise ConfigurationError(f"two handlers are named {one.declaration.name}: {other.origin} and {one.origin}")


def _of_module(module: str) -> list[Loaded]:
    origin = f"module {module} of RECEIVER_HANDLERS"
    members = vars(_imported(lambda: import_module(module), origin)).values()
    # A function can stand under two names in a module, and come from another one.
    functions = {id(member): (member, said) for member in members if (said := declared(member)) is not None}
    if not functions:
        raise ConfigurationError(f"{origin}: there is no @handler or @responder in it")
    return [Loaded(declaration=said, function=function, origin=origin, development=True)
            for function, said in functions.values()]


def _of_entry_point(point: EntryPoint) -> Loaded:
    origin = _origin(point)
    function = _imported(point.load, origin)
    said = declared(function)
    if said is None:
        raise ConfigurationError(f"{origin}: that is no function with @handler or @responder")
    if said.name != point.name:
        raise ConfigurationError(f"{origin}: it is declared with name={said.name!r}: the two must be the same")
    return Loaded(declaration=said, function=function, origin=origin, development=False)


def _imported(load: Callable[[], Any], origin: str) -> Any:
    try:
        return load()
    except ConfigurationError as exc:
        raise ConfigurationError(f"{origin}: {exc}") from exc
    except (Exception, SystemExit) as exc:
        raise ConfigurationError(f"{origin} cannot be imported: {type(exc).__name__}: {exc}") from exc


def _origin(point: EntryPoint) -> str:
    distribution = f" of {point.dist.name} {point.dist.version}" if point.dist is not None else ""
    return f"entry point {point.name} = {point.value}{distribution}"
