"""Log lines of plugins: which parts of them leave a handler process."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

from receiver.worker.handler_process import plugin_log
from receiver.worker.handler_process.plugin_log import RunIds

IDS = RunIds(handler="beds", destination="lab", uuid="u", delivery=7, attempt=1)
NAME = "Zoltana Quibblewitz"


def test_the_natural_line_of_a_plugin() -> None:
    """The text of an error is dropped and counted; the rest is printed with the ids of the run."""
    line = plugin_log.line(
        "error",
        {"event": "bed.not_assigned", "error": f"no bed for {NAME}", "ward": "w4", "id": UUID(int=1), "_run": IDS},
        None,
    )
    assert (line.event, line.dropped, line.names) == ("bed.not_assigned", 1, ())
    assert line.fields == {"ward": "w4", "id": str(UUID(int=1)), **IDS.fields}


def test_ids_cannot_be_rebound() -> None:
    """A field with the name of an id is dropped, whatever its value. Without a bound run, the current one is named."""
    given = {"event": "a.b", "handler": "zoltana", "delivery": 4711, "_run": NAME, "self": 1, "level": "x"}
    line = plugin_log.line("info", given, IDS)
    assert (line.fields, line.dropped) == (IDS.fields, 5)


def test_in_development_names_are_told() -> None:
    """At a development destination the names of dropped fields are printed, if they are names."""
    line = plugin_log.line("info", {"event": NAME, "patient": NAME, NAME: 1}, replace(IDS, development=True))
    assert (line.event, line.dropped, line.names) == ("log.unnamed", 2, ("patient",))


def test_an_exception() -> None:
    """log.exception() prints the class and the frames, and no text."""
    try:
        raise KeyError(NAME)
    except KeyError:
        line = plugin_log.line("error", {"event": "a.b", "exc_info": True}, None)
    assert line.fields["error_class"] == "KeyError"
    assert NAME not in str(line)
