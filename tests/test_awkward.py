"""Inputs as people bring them: a sample of tests/awkward, alone and combined."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.awkward.__main__ import drawn
from tests.awkward.judge import Judge, quiet_libraries
from tests.awkward.known import KNOWN
from tests.awkward.scene import TROUBLES

pytestmark = pytest.mark.filterwarnings("ignore")

THREAD = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+")
NAMES = sorted(TROUBLES.keys() - KNOWN.keys())
# One of each kind, quick ones, which end in each way.
SAMPLE = (
    ("several_ends", "no_metadata"),
    ("untied_without_a_head",),
    ("truncation_of_the_training", "lines_with_more_columns"),
    ("what_a_training_left", "text_with_windows_lines", "several_ends_of_a_turn"),
    ("rows_of_numbers",),
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    quiet_libraries()
    with Judge(tmp_path_factory.mktemp("awkward")) as made:
        yield made


def check(judge: Judge, names: Sequence[str]) -> str:
    verdict = judge.judge([TROUBLES[name] for name in names])
    assert verdict.problem == "", f"{verdict.said}\nrepeat: python -m tests.awkward --troubles {','.join(names)}"
    return verdict.ended


def test_each_trouble_cites_a_thread() -> None:
    assert len(TROUBLES) >= 180
    for each in TROUBLES.values():
        assert THREAD.search(str(each.make.__doc__)), each.name


def test_a_draw_depends_on_its_seed_and_number_only() -> None:
    first, again, other = (list(drawn(NAMES, seed, 5)) for seed in (7, 7, 8))
    assert first == again != other
    assert {len(names) for names in first} <= {2, 3}


def test_what_ends_wrong_is_known_by_name() -> None:
    assert KNOWN.keys() <= TROUBLES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("names", SAMPLE, ids="+".join)
def test_a_few_troubles(judge: Judge, names: tuple[str, ...]) -> None:
    assert check(judge, names) == ("refused" if any(TROUBLES[name].ends == "refused" for name in names) else "built")


@pytest.mark.slow
@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("part", range(4))  # so that workers share them
@given(data=st.data())
def test_combinations(judge: Judge, part: int, data: st.DataObject) -> None:
    own = NAMES[part::4]
    first = data.draw(st.sampled_from(own))
    others = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True))
    check(judge, list(dict.fromkeys((first, *others))))


@pytest.mark.slow
def test_the_judge_notices_what_is_lost(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that computes with other values than its base, and one that is refused late."""
    from packager.errors import PackError
    from packager.pipeline import pack, quantize_stage
    from packager.system import files

    put = files.write_atomic

    def change(path: Path, content: bytes) -> None:
        put(path, content.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 0.5'))

    monkeypatch.setattr(pack, "write_atomic", change)
    assert "the logits are" in judge.judge([TROUBLES["no_metadata"]]).problem
    monkeypatch.undo()

    def refuse(*_: object, **__: object) -> None:
        raise PackError("too late", where="recipe.yaml", hint="never")

    monkeypatch.setattr(quantize_stage, "audit_or_raise", refuse)
    assert "after the first block" in judge.judge([TROUBLES["no_metadata"]]).problem
