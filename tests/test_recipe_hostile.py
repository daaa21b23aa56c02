import json
import math
import time

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packager.errors import RecipeError
from packager.recipe import Recipe
from packager.recipe.file import load_recipe
from packager.recipe.schema import recipe_schema
from packager.recipe.yaml import MAX_BYTES, MAX_NODES, decode, parse
from packager.system.text import HIDDEN
from tests.hypothesis_profiles import examples
from tests.recipe_fixtures import GOOD, RECIPES, edited, load_or_error, problems_of, write_files
from tests.samples import sampled

BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 30))])
TEXTS = [GOOD, *(path.read_text(encoding="utf-8") for path in RECIPES)]
TOKENS = [
    *(
        "&a ",
        "*a",
        "!!python/object:os.system ",
        "!x ",
        "<<: ",
        "? ",
        "- ",
        ": ",
        "{",
        "}",
        "[",
        "]",
        ",",
        "|\n",
        ">-\n",
    ),
    *(
        "'",
        '"',
        "\t",
        "\n",
        "\r",
        "\x00",
        "\x85",
        "\u2028",
        "\ufeff",
        "\ud800",
        "#",
        "%YAML 1.1\n",
        "---\n",
        "...\n",
        "@",
        "`",
    ),
    *(
        ".nan",
        "-.inf",
        "1e999",
        "9" * 50,
        "0o8",
        "null",
        "~",
        "yes",
        '"\\U00110000"',
        '"\\ud800"',
        "x" * 500,
        "\N{SNOWMAN}",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "recipes"
    write_files(folder)
    return folder


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BOMB, "1:5: the anchor &a0 is refused (write every value out)"),
        (edited(("title: Demo", "title: *x")), "21:10: the alias *x is refused (write the value out)"),
        (
            edited(("title: Demo", "title: !!python/object/apply:os.system [id]")),
            "21:10: the tag '!!python/object/apply:os.system' is refused (write the plain value)",
        ),
        (edited(("title: Demo", "title: !!str Demo")), "21:10: the tag '!!str' is refused (write the plain value)"),
        (edited(("title: Demo", "title: ! Demo")), "21:10: the tag '!' is refused (write the plain value)"),
        (edited(("title: Demo", "title: !Demo")), "21:10: the tag '!Demo' is refused (write the plain value)"),
        (
            edited(("  title: Demo", "  title: Demo\n  <<: {a: 1}")),
            "22:3: merge keys (<<) are refused (write every value",
        ),
        (
            edited(("  title: Demo", "  title: Demo\n  title: Other")),
            "22:3: the key 'title' is given twice (it is first ",
        ),
        (edited(("  title: Demo", "  title: Demo\n  12: x")), "22:3: a key must be text, got '12'"),
        (
            edited(("  title: Demo", "  title: Demo\n  ? [a, b]\n  : c")),
            "22:5: a key must be text, got a list or a mapping",
        ),
        (edited(("  title: Demo", "  title: Demo\n  : c")), "22:3: a key must be text, got nothing"),
        (GOOD + "---\n" + GOOD, "26:1: a second document starts here (a recipe is one YAML document)"),
        ("%YAML 1.1\n---\n" + GOOD, "1:1: YAML directives are refused (delete this line)"),
        ("%TAG ! tag:x,2002:\n---\n" + GOOD, "1:1: YAML directives are refused (delete this line)"),
        ("%NEW thing\n---\n" + GOOD, "1:1: YAML directives are refused (delete this line)"),
        (
            edited(("bits: 4", "damp_percent: .nan")),
            "12:17: .nan is refused: numbers here are finite (quote it if it is ",
        ),
        (
            edited(("bits: 4", "damp_percent: -.INF")),
            "12:17: -.INF is refused: numbers here are finite (quote it if it ",
        ),
        (edited(("bits: 4", "damp_percent: 1e999")), "12:17: the number '1e999' is too large (quote it if it is text)"),
        (
            edited(("bits: 4", "bits: " + "9" * 30)),
            f"12:9: the number '{'9' * 30}' is too large (quote it if it is text)",
        ),
        (edited(("title: Demo", 'title: "a\\0b"')), "21:10: the invisible character U+0000 is refused"),
        (edited(("title: Demo", 'title: "a\\rb"')), "21:10: the invisible character U+000D is refused"),
        (edited(("title: Demo", 'title: "\\ud800"')), "21:10: the invisible character U+D800 is refused"),
        (edited(("title: Demo", 'title: "a\\nb"')), "21:10: card.title must be one line of text, got the text 'a\\nb'"),
        (edited(("title: Demo", 'title: "a\\tb"')), "21:10: card.title must be one line of text, got the text 'a\\tb'"),
        (edited(("title: Demo", "title: ''")), "21:10: card.title must not be empty, got the text ''"),
        (edited(("title: Demo", f"title: {'x' * 401}")), "21:10: card.title must have at most 400 characters"),
        (edited(("title: Demo", "title: Demo\x07")), "21:14: the invisible character U+0007 is refused"),
        (edited(("title: Demo", "title: Demo\u202e")), "21:14: the invisible character U+202E is refused"),
        (edited(("title: Demo", "title: Demo\u2028")), "21:14: the invisible character U+2028 is refused"),
        (GOOD.encode().replace(b"Demo", b"D\xc3\xa9mo\xff"), "21:14: byte 0xff is not UTF-8 (save the file as UTF-8)"),
        (GOOD.encode("utf-16"), "1:1: byte 0xff is not UTF-8 (save the file as UTF-8)"),
        (b"", "1:1: the recipe is empty"),
        (b"# nothing\n", "1:1: the recipe is empty"),
        (b"- a\n", "1:1: a recipe is a mapping of keys to values, got a list"),
        (b"text", "1:1: a recipe is a mapping of keys to values, got the text 'text'"),
        ("a: " + "[" * 5000, "1:19: values are nested more than 16 levels deep"),
        ("- " * 5000, "1:33: values are nested more than 16 levels deep"),
        ("- a\n" * (MAX_NODES + 1), f"{MAX_NODES}:3: the recipe has more than {MAX_NODES} values"),
        ("#" * (MAX_BYTES + 1), "1:1: the file is larger than 256 KiB (a recipe has a few KiB)"),
        (
            edited(("title: Demo", "title: a: b")),
            "21:11: this is not valid YAML: mapping values are not allowed here (",
        ),
        (
            edited(("  title: Demo", "\ttitle: Demo")),
            "21:1: this is not valid YAML: found character '\\t' that cannot ",
        ),
        (
            edited(("title: Demo", "title: @demo")),
            "21:10: this is not valid YAML: found character '@' that cannot start ",
        ),
        (edited(("title: Demo", "title: [a")), "22:10: this is not valid YAML: expected ',' or ']', but got ':'"),
        (
            edited(("title: Demo", 'title: "\\UFFFFFFFF"')),
            "21:8: this is not valid YAML, here or a little further down (",
        ),
        (edited(("  title: Demo", " title: Demo")), "22:10: this is not valid YAML: "),
    ],
)
def test_features_that_no_recipe_needs_are_refused_with_their_position(folder, content, expected):
    found = problems_of(folder, content)
    assert any(line.startswith(expected) for line in found), "\n".join(found)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(folder):
    assert problems_of(folder, "\ufeff" + GOOD.replace("\n", "\r\n")) == []
    found = problems_of(folder, edited(("  title: Demo", "  titel: Demo")).replace("\n", "\r\n"))
    assert [line.split(" ")[0] for line in found] == ["20:1:", "21:3:"]


def test_a_refused_value_is_not_also_a_wrong_one(folder):
    found = problems_of(folder, edited(("path: model", "path: !!str model"), ("bits: 4", "bits: *four")))
    assert [line.split(" ")[0] for line in found] == ["5:9:", "12:9:"]


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "..", "a/../../b", "~/x", "C:/x", "a\\b", "", "a\nb", "x" * 401, "\N{RIGHT-TO-LEFT MARK}"]
)
def test_paths_stay_in_the_folder(folder, path):
    found = problems_of(folder, edited(("path: calibration.txt", f"path: {json.dumps(path)}")))
    assert len(found) == 1
    assert found[0].startswith(
        (
            "7:9: calibration.path must be relative",
            "7:9: calibration.path must have at most 400",
            "7:9: the invisible character U+200F is refused",
        )
    )


@pytest.mark.parametrize("path", ["x" * 300, "a/" * 199 + "b"])
def test_paths_that_no_disk_can_hold_are_files_that_are_not_there(folder, path):
    found = problems_of(folder, edited(("path: calibration.txt", f"path: {path}")))
    assert len(found) == 1
    assert found[0].startswith(f"7:9: calibration.path: there is no file '{path[:50]}")
    assert len(found[0]) < 200


UNITS = ["[", "{", "x ", "'", "# c\n", "x: 1\n", "&a ", "%a\n", "|\n"]


@pytest.mark.parametrize("unit", sampled(UNITS, "[", "x: 1\n", "&a "))
def test_a_large_file_takes_no_more_than_its_length(unit, folder):
    start = time.process_time()
    problems_of(folder, unit * (MAX_BYTES // 4 // len(unit)))
    assert time.process_time() - start < 3  # up to 0.3 s measured; a scan of quadratic time takes minutes


def mutated():
    """Return recipes with a few places replaced by bits of YAML, or by other parts of themselves."""

    @st.composite
    def build(draw):
        text = draw(st.sampled_from(TEXTS))
        for _ in range(draw(st.integers(1, 6))):
            start = draw(st.integers(0, len(text)))
            end = min(len(text), start + draw(st.sampled_from([0, 0, 1, 2, 5, 30])))
            piece = draw(st.sampled_from(TOKENS) | st.just(text[: end // 2][-40:]) | st.text(max_size=5))
            text = text[:start] + piece + text[end:]
        return text

    return build()


@settings(max_examples=examples(80), database=None)
@given(text=mutated())
def test_a_mutated_recipe_is_a_recipe_or_a_recipe_error(folder, text):
    path = folder / "mutated.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    result = load_or_error(path)
    if isinstance(result, Recipe):
        assert result.digest()
        jsonschema.Draft202012Validator(recipe_schema()).validate(result.model_dump(mode="json", exclude_unset=True))
        return
    assert result.problems
    assert all(problem.where.startswith(f"{path}:") and problem.message for problem in result.problems)
    assert str(result).replace("\n", "").isprintable()
    assert str(result).count("\n") == len(result.problems)


@settings(max_examples=examples(60), database=None)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_a_recipe_error(folder, data):
    path = folder / "bytes.yaml"
    path.write_bytes(data)
    with pytest.raises(RecipeError):
        load_recipe(path)


SCALARS = st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x24F, exclude_categories=("Cc", "Cs")), max_size=12)


@settings(max_examples=examples(50), database=None)
@given(
    value=st.recursive(
        SCALARS | WORDS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3)
    )
)
def test_json_is_read_as_json_reads_it(value):
    """JSON is a part of YAML 1.2, and its own reader an independent oracle."""
    text, findings = decode(json.dumps({"value": value}, ensure_ascii=False, indent=1).encode())
    root, more = parse(text)
    if any(key == "<<" for key in _keys(value)) or HIDDEN.search(text):
        return
    assert not findings
    assert not more
    assert root is not None
    assert _same(_lists(root.plain()), json.loads(text))


def _keys(value):
    if isinstance(value, dict):
        yield from value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _keys(child)


def _lists(value):
    if isinstance(value, tuple):
        return [_lists(child) for child in value]
    return {key: _lists(child) for key, child in value.items()} if isinstance(value, dict) else value


def _same(left, right):
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=0, abs_tol=0)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right
