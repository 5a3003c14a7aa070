"""Discovery in a process of its own."""

from __future__ import annotations

import sys

import pytest

from receiver.errors import ConfigurationError
from receiver.worker import discovery
from receiver.worker.discovery_process import declared_handler, declared_handlers
from receiver.worker.load_failure import PluginError
from tests.worker.plugin_installation import BEDS, Install


def test_declarations_without_the_import(install: Install) -> None:
    """The process returns what an import would, and the plugin is not imported into this process."""
    install("acme-beds", "acme_beds", BEDS, beds="acme_beds:beds")
    install("bad", "bad", "raise RuntimeError('no license')", bad="bad:bad")
    found = declared_handlers({"beds", "bad", "not-installed"}, ())
    assert not {"acme_beds", "bad"} & sys.modules.keys()

    here = discovery.load_handlers({"beds", "bad"}, ())
    assert {name: each.spec for name, each in found.loaded.items()} == {
        name: each.spec for name, each in here.loaded.items()
    }
    assert found.loaded["beds"].origin == here.loaded["beds"].origin
    assert found.failures == here.failures


@pytest.mark.parametrize(
    ("source", "error_class", "how"),
    [
        ("import os; os._exit(3)", "Exit3", "its import ended the process with exit status 3"),
        ("import os; os._exit(0)", "Exit0", "its import ended the process with exit status 0"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL", "its import ended the process with SIGKILL"),
        ("import time; time.sleep(600)", "TimedOut", "its import takes more than 10 seconds"),
    ],
)
def test_an_import_that_ends_the_process(install: Install, source: str, error_class: str, how: str) -> None:
    """An import that ends or hangs the process is a failure of that plugin or module, and the other plugins are
    found.
    """
    install("bad", "bad", source, bad="bad:bad")
    install("acme-beds", "acme_beds", BEDS, beds="acme_beds:beds")
    for modules, handler, origin in (
        ((), "bad", "entry point bad = bad:bad of bad 1.0"),
        (("bad",), None, "module bad of RECEIVER_HANDLERS"),
    ):
        found = declared_handlers({"beds"} if modules else {"beds", "bad"}, modules, timeout=10)
        assert list(found.loaded) == ["beds"]
        [failure] = found.failures
        assert (failure.handler, failure.origin, failure.error_class) == (handler, origin, error_class)
        assert failure.message == failure.summary == f"{origin} cannot be imported: {how}"
        assert failure.ended


def test_one_handler(install: Install) -> None:
    """One handler is returned, or the reason why it cannot be loaded is raised."""
    install("bad", "bad", "import os; os._exit(3)", bad="bad:bad")
    install("acme-beds", "acme_beds", BEDS, beds="acme_beds:beds")
    assert declared_handler("beds", ()).declaration.name == "beds"
    with pytest.raises(PluginError, match="exit status 3"):
        declared_handler("bad", ())
    with pytest.raises(ConfigurationError, match="handler nowhere is not installed on this host"):
        declared_handler("nowhere", ())
