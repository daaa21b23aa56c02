"""The log of a command as events, one JSON object a line: for the programs that watch a build."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal

EventName = Literal["message", "stage_started", "step", "stage_finished", "error"]
EVENT_VERSION: Final = 1

# The keys of each event beside schema_version, time and event, with type and meaning.
EVENT_KEYS: Final[Mapping[EventName, Mapping[str, tuple[str, str]]]] = {
    "message": {"text": ("string", "what a person reads in the log")},
    "stage_started": {"stage": ("string", "its name, such as quantize")},
    "step": {
        "stage": ("string", "the stage that the step is in"),
        "done": ("integer", "finished steps of the stage"),
        "total": ("integer", "all steps of the stage"),
        "text": ("string", "what was done"),
        "seconds_left": (
            "number or null",
            "for the rest of the stage; null until two steps have shown how long one takes",
        ),
    },
    "stage_finished": {"stage": ("string", "its name"), "seconds": ("number", "how long it took")},
    "error": {
        "code": ("string", "the error's class"),
        "exit_code": ("integer", "of the command, if it ends with this error"),
        "what": ("string", "what failed"),
        "where": ("string", "the file, branch or linear, or empty"),
        "why": ("string", "the cause as far as it is known, or empty"),
        "hint": ("string", "what to do, or empty"),
    },
}


EXAMPLE_STEP: Final[Mapping[str, object]] = {
    "stage": "quantize", "done": 8, "total": 24, "text": "main block 8/24", "seconds_left": 125.4,
}  # fmt: skip


def event_line(event: EventName, fields: Mapping[str, object], now: datetime | None = None) -> str:
    """Return one line of the log, without the line break; `now` is the present time."""
    time = (now or datetime.now(UTC)).isoformat(timespec="milliseconds")
    return json.dumps({"schema_version": EVENT_VERSION, "time": time, "event": event, **fields})


def event_schema() -> dict[str, Any]:
    """Return the JSON schema of a line."""
    common = {
        "schema_version": {"const": EVENT_VERSION},
        "time": {"type": "string", "format": "date-time", "description": "UTC"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "An event of a packager log",
        "oneOf": [
            {
                "type": "object",
                "properties": {
                    **common,
                    "event": {"const": event},
                    **{
                        key: {"type": _json_type(kind), "description": meaning} for key, (kind, meaning) in keys.items()
                    },
                },
                "required": [*common, "event", *keys],
                "additionalProperties": False,
            }
            for event, keys in EVENT_KEYS.items()
        ],
    }


def _json_type(kind: str) -> str | list[str]:
    kinds = kind.split(" or ")
    return kinds if len(kinds) > 1 else kind
