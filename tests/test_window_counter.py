"""The counter that every rate limit counts with."""

from __future__ import annotations

from receiver.window_counter import WindowCounter


def test_counts_keys_and_all_of_them() -> None:
    """Each key has a count of its own, and all of them a total; a key that was not counted has 0."""
    counter: WindowCounter[str] = WindowCounter()
    assert [counter.add(key) for key in "aba"] == [1, 1, 2]
    assert (counter["a"], counter["b"], counter["c"]) == (2, 1, 0)
    assert (counter.total, len(counter)) == (3, 2)


def test_a_window_begins_with_the_first_roll() -> None:
    """It lasts its seconds from there; then the counts begin anew."""
    counter: WindowCounter[str] = WindowCounter(60.0)
    counter.roll(5.0)
    counter.add("a")
    counter.roll(64.9)
    assert counter.add("a") == 2
    assert not counter.ended(64.9)
    assert counter.ended(65.0)
    counter.roll(65.0)
    assert (counter["a"], counter.total, len(counter)) == (0, 0, 0)
    counter.add("a")
    counter.roll(124.9)
    assert counter["a"] == 1


def test_a_window_that_began_before() -> None:
    """With `began` the first window is known to have begun."""
    counter: WindowCounter[str] = WindowCounter(60.0, began=10.0)
    counter.add("a")
    counter.roll(69.9)
    assert counter["a"] == 1
    counter.roll(70.0)
    assert counter["a"] == 0


def test_memory_is_bounded() -> None:
    """However many keys there are, `keys` are remembered: those that were counted last. The total counts all."""
    counter: WindowCounter[str] = WindowCounter(keys=10_000)
    for number in range(30_000):
        counter.add(f"key {number}")
        if number % 1_000 == 0:
            counter.add("steady")
    assert len(counter) == 10_000
    assert counter["steady"] == 30
    assert counter["key 0"] == 0
    assert counter["key 29999"] == 1
    assert counter.total == 30_030
