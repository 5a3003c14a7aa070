"""The soak in its short form, on a real machine."""

from __future__ import annotations

from tests.faults import hoarding, soak


def test_a_leak_is_found() -> None:
    """A handler leaks one descriptor for each message, and the report names its process."""
    found = soak.measure(lambda _: None, minutes=0.12, rate=12, also=[hoarding.__name__])
    assert any(each.startswith("descriptors of worker's handler processes is growing") for each in found.violations), (
        found.text
    )
    assert "Bytes a message, indexes included: " in found.text
    assert not [each for each in found.violations if "answered" in each or "had not ended" in each]
