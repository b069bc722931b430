"""Refuses JSON schemas that say more than a grammar can hold the output to.

xgrammar leaves out such keywords without a word, and the output would break the schema.
"""

import json
from collections.abc import Iterator, Mapping

from nanoflow_compiler.errors import RequestError

__all__ = ["check_schema"]

UNSUPPORTED = (
    "contains",
    "dependentRequired",
    "dependentSchemas",
    "if",
    "maxContains",
    "minContains",
    "not",
    "uniqueItems",
)
# What lies below is named by the user, or is a value and no schema.
NAMED = ("$defs", "definitions", "patternProperties", "properties")
VALUES = ("const", "default", "enum", "examples")


def check_schema(text: str) -> None:
    """Raises :class:`RequestError` naming the first keyword that would be ignored."""
    for schema in _schemas(json.loads(text)):
        for keyword in _ignored(schema):
            raise RequestError(
                f"structured_outputs.json uses {keyword}, which cannot be enforced while "
                "generating; leave it out and check the output"
            )


def _schemas(schema: object) -> Iterator[Mapping[str, object]]:
    """Every schema inside of one. Without recursion, because a user decides how deep they nest."""
    left = [schema]
    while left:
        found = left.pop()
        if isinstance(found, list):
            left.extend(found)
        elif isinstance(found, dict):
            yield found
            for key, value in found.items():
                if key in NAMED and isinstance(value, dict):
                    left.extend(value.values())
                elif key not in VALUES:
                    left.append(value)


def _ignored(schema: Mapping[str, object]) -> Iterator[str]:
    yield from (keyword for keyword in UNSUPPORTED if schema.get(keyword, False) is not False)
    if "multipleOf" in schema and schema.get("type") != "integer":
        yield "multipleOf of a type other than integer"
    if "pattern" in schema and ("minLength" in schema or "maxLength" in schema):
        yield "pattern together with minLength or maxLength"
    branches = schema.get("allOf")
    if isinstance(branches, list) and len(branches) > 1:
        yield "allOf of several schemas"
