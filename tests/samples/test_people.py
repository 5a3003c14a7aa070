"""Synthetic people."""

from __future__ import annotations

import random

from receiver.samples.people import person


def test_a_seed_always_gives_the_same_person() -> None:
    """A seed always gives the same person."""
    assert person(7) == person(7)
    assert person(7) != person(8)


def test_the_family_name_can_be_a_marker() -> None:
    """The family name can be given; the rest of the person stays the same."""
    marked = person(7, family="Zzcanary")
    assert marked.family == "Zzcanary"
    assert marked.email.endswith(".zzcanary@example.com")
    assert marked.mrn == person(7).mrn


def test_nobody_real_has_these_numbers() -> None:
    """Numbers were never issued, phone numbers are reserved for fiction, and mail is undeliverable."""
    for seed in range(200):
        who = person(seed)
        assert who.ssn.startswith("9")
        assert who.npi.startswith("9")
        assert len(who.ssn) == 9
        assert len(who.npi) == len(who.mrn) == 10
        for phone in (who.home_phone, who.mobile_phone):
            assert len(phone) == 12
            assert phone[5:10] == "55501"
        assert who.email.endswith("@example.com")


def test_global_randomness_is_left_alone() -> None:
    """Samples do not use or change the global random state."""
    before = random.getstate()
    person(3)
    assert random.getstate() == before
