"""Strategies for JSON texts, and Python's json as the reference for them."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

# JSON texts composed of pieces, not serialized: with white space anywhere, names escaped in several ways, and duplicate
# names. Strings contain brackets, quotes and backslashes, which are not structure.
SPACE = st.sampled_from(["", " ", "\n\t", "\r\n "])
NAME = st.sampled_from(['"a"', '"b"', '"\\u0061"', '"Meta"', '"M\\u0065ta"', '""', '"\\""', '"{"', '"é"', '"\\\\"'])
STRING = st.lists(
    st.sampled_from(["[", "]", "{", "}", ":", ",", '\\"', "\\\\", "\\n", "\\u005b", "x", "é"]), max_size=6
).map(lambda parts: f'"{"".join(parts)}"')
NUMBER = st.sampled_from(["0", "-0", "1", "12", "123", "1.5", "1e5", "1E+400", "123456789012345678901234567890"])
LITERAL = st.sampled_from(["true", "false", "null"])


def arrays(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    items = st.lists(st.builds("{}{}{}".format, SPACE, values, SPACE), max_size=4)
    return items.map(lambda parts: f"[{','.join(parts)}]")


def json_objects(values: st.SearchStrategy[str], names: st.SearchStrategy[str] = NAME) -> st.SearchStrategy[str]:
    items = st.lists(st.builds("{}{}{}:{}{}{}".format, SPACE, names, SPACE, SPACE, values, SPACE), max_size=5)
    return st.builds("{{{}{}}}".format, SPACE, items.map(",".join))


VALUE = st.recursive(STRING | NUMBER | LITERAL, lambda values: arrays(values) | json_objects(values), max_leaves=12)
OBJECT = st.builds("{}{}{}".format, SPACE, json_objects(VALUE), SPACE)
# The form that programs write: no white space around names.
COMPACT = st.lists(st.builds("{}:{}".format, NAME, VALUE), max_size=5).map(lambda items: f"{{{','.join(items)}}}")


class Pairs(list[tuple[str, Any]]):
    """An object as json parsed it, with every member, including duplicates."""


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_json(text: str) -> Any:
    """Parse the text with Python's json. Numbers stay text: their size is not a matter of syntax."""
    return json.loads(text, object_pairs_hook=Pairs, parse_constant=_constant, parse_int=str, parse_float=str)


def depth(value: Any) -> int:
    if isinstance(value, Pairs):
        return 1 + max((depth(inner) for _, inner in value), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0
