"""Installed plugins for the tests of discovery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

# Installs a distribution: its name, its module, the module's source, and its entry points.
Install = Callable[..., None]

BEDS: Final = """
    from receiver.handlers import handler, responder
    @handler("PatientAdmin.*", name="beds", ordering="none")
    def beds(message, context): ...
    @responder("PatientSearch.Query", name="search")
    def search(message, context): ...
    other_name = beds
"""
