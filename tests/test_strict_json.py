"""JSON that parsers understand in different ways, or that costs too much, is refused with a sentence."""

import pytest

from packager.model.strict_json import parse_json, parse_json_object

REFUSED = {
    "twice": ('{"a": 1, "a": 2}', "given twice"),
    "twice inside": ('[{"b": {"a": 1, "a": 1}}]', "given twice"),
    "1e999": ("[1e999]", "too large for a float"),
    "-1E+400": ("-1E+400", "too large for a float"),
    "65 digits": ("1" * 65, "more than 64 digits"),
    "nan": ("NaN", "NaN is not JSON"),
    "infinity": ("-Infinity", "-Infinity is not JSON"),
    "surrogate": (r'["\ud800"]', "half of a surrogate pair"),
    "surrogate in a key": (r'{"a": [{"\uDFFF": 1}]}', "half of a surrogate pair"),
    "65 levels": ("[" * 65 + "]" * 65, "nested more than 64 levels"),
    "deep": ("[" * 200_000, "nested more than 64 levels"),
    "values": ("[" + "1," * 20 + "1]", "more than 20 values"),
    "mark": ("\ufeff{}", "BOM"),
    "nothing": ("", "Expecting value"),
}
ACCEPTED = {
    "digits in a string": (f'"{"1" * 100}"', "1" * 100),
    "64 levels": ("[" * 64 + "]" * 64, None),
    "1e99": ("1e99", 1e99),
    "large": ("1000000000000000019884624838656", 1000000000000000019884624838656),
    "pair": (r'"\ud83d\ude00"', "\U0001f600"),
    "escaped": (r'"\\ud800"', "\\ud800"),
    "small": ("1e-999", 0.0),
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_single_meaning_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(text.encode(), most_values=20 if "values" in reason else 10**6)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("text", "value"), ACCEPTED.values(), ids=ACCEPTED)
def test_ordinary_json_is_read(text: str, value: object) -> None:
    found = parse_json(text.encode())
    assert value is None or found == value


def test_other_values_than_objects_and_other_encodings_are_refused() -> None:
    for data in (b"[]", b"null", b"\xff", "{}".encode("utf-16")):
        with pytest.raises(ValueError, match=r"not a JSON object|utf-8"):
            parse_json_object(data)
