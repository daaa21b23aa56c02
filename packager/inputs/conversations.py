"""Read conversations from the rows of a dataset: {role, content} or ShareGPT's {from, value}."""

from collections.abc import Mapping, Sequence
from typing import Final

from packager.errors import CalibrationError
from packager.inputs.limits import Chat
from packager.system.text import shown

_ROLES: Final = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip
_MESSAGE_SIZE: Final = 16  # characters that a template adds to a message, about


def conversation(value: object, where: str) -> Chat:
    """Return a row's messages, as the chat template gets them.

    Args:
        value: a list of messages: {"role", "content"} or {"from", "value"}. A content may be a list of parts
            {"type": "text", "text"}, whose texts are joined.
        where: the row.

    Raises:
        CalibrationError: it is something else; names the row, the message and the key.
    """
    if not isinstance(value, list):
        raise CalibrationError(
            "a row has no list of messages", where=where, why=f"it holds {kind_of_value(value)}",
            hint="set messages_field, or text_field if the column holds plain text",
        )  # fmt: skip
    return Chat(messages=tuple(_message(item, f"{where}, message {number}") for number, item in enumerate(value, 1)))


def size_of(chat: Chat) -> int:
    """Return about how many characters a conversation has once it is rendered."""
    return sum(len(message["content"]) + _MESSAGE_SIZE for message in chat.messages)


def is_conversation(value: object) -> bool:
    """Return whether a value looks like a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys())
                for item in value)
    )  # fmt: skip


def kind_of_value(value: object) -> str:
    """Return what a value is, as people call it."""
    known: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "true or false"),
        ((int, float), "a number"),
        (str, "text"),
        ((list, tuple), "a list"),
        (dict, "an object"),
    )
    if value is None:
        return "null"
    return next((name for kind, name in known if isinstance(value, kind)), f"a value of type {type(value).__name__}")


def _message(item: object, where: str) -> Mapping[str, str]:
    if not isinstance(item, Mapping):
        raise CalibrationError("a message is not an object", where=where, why=f"it is {kind_of_value(item)}")
    if item.get("role") is not None:
        role = item["role"]
        if not isinstance(role, str):
            raise CalibrationError("the role of a message is not text", where=where, why=f"it is {shown(role)}")
        return {"role": role, "content": _content(item.get("content"), where, "content")}
    speaker = item.get("from")
    if not isinstance(speaker, str) or speaker.lower() not in _ROLES:
        raise CalibrationError(
            "a message has no role",
            where=where,
            why=f"it has the keys {shown(sorted(map(str, item)))}" + (f", from is {shown(speaker)}" if speaker else ""),
            hint=f"a message is {{role, content}}, or {{from, value}} where from is one of {', '.join(_ROLES)}",
        )
    return {"role": _ROLES[speaker.lower()], "content": _content(item.get("value"), where, "value")}


def _content(value: object, where: str, key: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value:
        texts = [part.get("text") for part in value if isinstance(part, Mapping) and part.get("type") == "text"]
        if len(texts) == len(value) and all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    why = f"it is {kind_of_value(value)}"
    if isinstance(value, list):
        why += " with a part that is no text"
    raise CalibrationError(
        f"the {key} of a message is not text", where=where, why=why,
        hint="calibration takes conversations of text: no tool calls, no pictures",
    )  # fmt: skip
