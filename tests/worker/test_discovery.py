"""Discovery of handlers: installed plugins, modules, and what cannot be loaded."""

from __future__ import annotations

import re
import sys

import pytest

from receiver.errors import ConfigurationError
from receiver.storage.registry.handler_changes import HandlerSpec
from receiver.worker import discovery
from receiver.worker.load_failure import PluginError
from tests.worker.plugin_installation import BEDS, Install
from tests.worker.world import PLUGIN


def test_found_is_not_imported(install: Install) -> None:
    """Installed handlers are listed with their origin, and imported only on request."""
    install("acme-beds", "acme_beds", BEDS, beds="acme_beds:beds", search="acme_beds:search")
    install("broken", "broken", "raise RuntimeError('do not import me')", broken="broken:nothing")

    assert [(each.name, each.origin) for each in discovery.found() if each.name in ("beds", "broken")] == [
        ("beds", "entry point beds = acme_beds:beds of acme-beds 1.0"),
        ("broken", "entry point broken = broken:nothing of broken 1.0"),
    ]
    assert not {"acme_beds", "broken"} & sys.modules.keys()
    loaded = discovery.load_handlers({"beds", "not-installed"}, ()).loaded
    assert list(loaded) == ["beds"]
    assert "broken" not in sys.modules


def test_its_spec(install: Install) -> None:
    """The spec of a loaded handler is what the registry stores."""
    install("acme-beds", "acme_beds", BEDS, beds="acme_beds:beds")
    loaded = discovery.load_handler("beds", ())

    assert loaded.spec == HandlerSpec(
        handler="beds",
        role="handler",
        patterns=("PatientAdmin.*",),
        ordering="none",
        patient_key=None,
        acknowledge="after_commit",
        on_failure="dead",
        max_attempts=10,
        timeout=60.0,
    )
    assert not loaded.development


def test_modules(install: Install) -> None:
    """All handlers of a module of RECEIVER_HANDLERS are loaded, each function once."""
    install("acme-beds", "acme_beds", BEDS, beds="acme_beds:beds")
    loaded = discovery.load_handlers({"beds"}, ["acme_beds"]).loaded

    assert sorted(loaded) == ["beds", "search"]
    assert all(each.development for each in loaded.values())  # also where the plugin is installed besides
    assert loaded["beds"].origin == "module acme_beds of RECEIVER_HANDLERS"


def test_the_test_plugin() -> None:
    """The handlers that the other tests use are found in their module."""
    assert {"scripted", "search", "within"} <= discovery.load_handlers((), [PLUGIN]).loaded.keys()


@pytest.mark.parametrize(
    ("source", "point", "says"),
    [
        (
            "raise RuntimeError('no licence')",
            "bad:bad",
            "entry point bad = bad:bad of bad 1.0 cannot be imported: RuntimeError: no licence",
        ),
        ("import sys; sys.exit(3)", "bad:bad", "cannot be imported: SystemExit: 3"),
        ("import no_such_library", "bad:bad", "cannot be imported: ModuleNotFoundError"),
        ("", "bad:bad", "cannot be imported: AttributeError"),
        ("def bad(message, context): ...", "bad:bad", "the object is not a function with @handler or @responder"),
        (
            "from receiver.handlers import handler\n@handler('*', name='good')\ndef bad(message, context): ...",
            "bad:bad",
            "the function is declared with name='good': use the same name",
        ),
        (
            "from receiver.handlers import handler\n@handler('*', name='bad', ordring='none')\ndef bad(m, c): ...",
            "bad:bad",
            "cannot be imported: TypeError: .*ordring",
        ),
        (
            "from receiver.handlers import handler\n@handler('*', name='bad', timeout=0)\ndef bad(m, c): ...",
            "bad:bad",
            "entry point bad = bad:bad of bad 1.0: @handler bad: timeout must be more than 0",
        ),
    ],
)
def test_what_cannot_be_loaded(install: Install, source: str, point: str, says: str) -> None:
    """A plugin that cannot be loaded is reported with the reason, and the others are loaded."""
    install("bad", "bad", source, bad=point)
    install("acme-beds", "acme_beds", BEDS, beds="acme_beds:beds")

    plugins = discovery.load_handlers({"bad", "beds"}, ())
    assert list(plugins.loaded) == ["beds"]
    [failure] = plugins.failures
    assert failure.handler == "bad"
    assert re.search(says, failure.message)
    with pytest.raises(PluginError, match=says):
        discovery.load_handler("bad", ())


@pytest.mark.parametrize(
    ("source", "place", "expected", "hidden"),
    [
        ("x = 1\nraise RuntimeError('password canary')", "bad:2", "RuntimeError", "canary"),
        ("import no_such_library", "bad:1", "No module named 'no_such_library'", None),
        ("x = 1\ndef broken(:\n", r"/bad\.py:2", "SyntaxError", None),
    ],
)
def test_where_an_import_failed(install: Install, source: str, place: str, expected: str, hidden: str | None) -> None:
    """A failure names its place in the plugin. Its summary, for logs, quotes only the text of Python's own errors."""
    install("bad", "bad", source, bad="bad:bad")

    [failure] = discovery.load_handlers({"bad"}, ()).failures
    assert re.search(place, failure.place or "")
    assert expected in failure.summary
    assert hidden is None or (hidden in failure.message and hidden not in failure.summary + repr(failure))


def test_a_module_without_handlers(install: Install) -> None:
    """A module of RECEIVER_HANDLERS that contains no handler, or does not exist, is a failure."""
    install("empty", "empty", "")
    empty, missing = discovery.load_handlers((), ["empty", "no_such"]).failures
    assert (
        empty.message
        == "module empty of RECEIVER_HANDLERS: the module contains no function with @handler or @responder"
    )
    assert missing.message.startswith("module no_such of RECEIVER_HANDLERS cannot be imported: ModuleNotFoundError")
    assert empty.handler is missing.handler is None


def test_a_broken_module_does_not_affect_others(install: Install) -> None:
    """Other handlers are loaded although a module cannot be imported. A handler that may be in it gets its failure."""
    install("acme-beds", "acme_beds", BEDS, beds="acme_beds:beds")
    assert discovery.load_handler("beds", ["no_such"]).declaration.name == "beds"
    with pytest.raises(PluginError, match="module no_such of RECEIVER_HANDLERS cannot be imported"):
        discovery.load_handler("elsewhere", ["no_such"])


def test_duplicate_names(install: Install) -> None:
    """If two handlers have the same name, neither is loaded, and both are named."""
    install("acme-beds", "acme_beds", BEDS, beds="acme_beds:beds")
    install("other-beds", "other_beds", BEDS, beds="other_beds:beds")

    for modules, says in (
        ((), r"two handlers are named beds: .*-beds 1\.0 and .*-beds 1\.0"),
        (("acme_beds",), r"two handlers are named beds: module acme_beds .* and entry point"),
    ):
        plugins = discovery.load_handlers({"beds"}, modules)
        assert "beds" not in plugins.loaded
        assert [re.match(says, each.message) is not None for each in plugins.failures] == [True]


def test_a_handler_that_is_not_installed() -> None:
    """The error names a handler that is not installed on this host."""
    with pytest.raises(ConfigurationError, match="handler nowhere is not installed on this host: install its plugin"):
        discovery.load_handler("nowhere", ())


def spec(name: str, role: str, *patterns: str) -> HandlerSpec:
    """Return a spec of which only these fields matter."""
    return HandlerSpec(
        handler=name,
        role=role,
        patterns=patterns,
        ordering="source",
        patient_key=None,
        acknowledge="after_commit",
        on_failure="dead",
        max_attempts=1,
        timeout=1,
    )


def test_one_responder_for_a_query() -> None:
    """Two responders for one query at one destination are a conflict; the message gives the command that resolves it.

    At two destinations, or together with a handler, they are not.
    """
    one, two = spec("one", "responder", "Order.Query", "Notes.Query"), spec("two", "responder", "Notes.Query")
    assert discovery.responder_conflicts({"lab": [one, spec("all", "handler", "*")], "ward": [two]}) == []

    assert discovery.responder_conflicts({"lab": [one, two]}) == [
        (
            "two",
            "lab",
            (
                "Notes.Query is answered by both one and two at lab: run `redox-receiver handlers disable two "
                "--destination lab`"
            ),
        )
    ]
