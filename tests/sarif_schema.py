"""The parts of the SARIF 2.1.0 schema that an audit's log uses.

After https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json: the required
properties, types, ranges and enumerations are those of the standard. Its objects have more optional properties; here an
object with any other property is refused, so that a mistyped one is found.
"""

from typing import Any


def _closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


_TEXT = {"type": "string"}
_URI = {"type": "string", "format": "uri-reference", "pattern": r"^[A-Za-z0-9._~!$&'()*+,;=:@/?#%\[\]-]*$"}
_MESSAGE = _closed(["text"], text=_TEXT)
_LEVEL = {"enum": ["none", "note", "warning", "error"]}
_PHYSICAL = _closed(
    ["artifactLocation"],
    artifactLocation=_closed([], uri=_URI),
    region=_closed([], startLine={"type": "integer", "minimum": 1}),
)
_LOCATION = _closed(
    [],
    physicalLocation=_PHYSICAL,
    logicalLocations={
        "type": "array",
        "minItems": 0,
        "uniqueItems": True,
        "items": _closed([], fullyQualifiedName=_TEXT),
    },
)
_RULE = _closed(
    ["id"],
    id=_TEXT,
    shortDescription=_MESSAGE,
    help=_MESSAGE,
    defaultConfiguration=_closed([], level=_LEVEL),
)
_RESULT = _closed(
    ["message"],
    ruleId=_TEXT,
    ruleIndex={"type": "integer", "minimum": -1},
    level=_LEVEL,
    message=_MESSAGE,
    locations={"type": "array", "minItems": 0, "items": _LOCATION},
    partialFingerprints={"type": "object", "additionalProperties": _TEXT},
)
_RUN = _closed(
    ["tool"],
    tool=_closed(
        ["driver"],
        driver=_closed(
            ["name"],
            name=_TEXT,
            semanticVersion=_TEXT,
            rules={"type": "array", "minItems": 0, "uniqueItems": True, "items": _RULE},
        ),
    ),
    results={"type": ["array", "null"], "minItems": 0, "items": _RESULT},
    columnKind={"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
    properties={"type": "object"},
)
SARIF: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    **_closed(
        ["version", "runs"],
        **{"$schema": {"type": "string"}, "version": {"enum": ["2.1.0"]}},
        runs={"type": ["array", "null"], "minItems": 0, "items": _RUN},
    ),
}
