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
    ("tied_with_a_head_of_its_own",),
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


@pytest.mark.parametrize("names", SAMPLE, ids="+".join)
def test_a_few_troubles(judge: Judge, names: tuple[str, ...]) -> None:
    assert check(judge, names) == ("refused" if any(TROUBLES[name].ends == "refused" for name in names) else "built")


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("part", range(4))  # so that workers share them
@given(data=st.data())
def test_combinations(judge: Judge, part: int, data: st.DataObject) -> None:
    own = NAMES[part::4]
    first = data.draw(st.sampled_from(own))
    others = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True))
    check(judge, list(dict.fromkeys((first, *others))))


@pytest.mark.slow
def test_the_judge_notices_what_is_lost(judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that drops an own head, and one that packs other weights."""
    from packager.inputs import base_model
    from packager.model.rope import in_both_spellings
    from packager.pipeline import pack

    monkeypatch.setattr(base_model, "check_tied", lambda *_: None)
    verdict = judge.judge([TROUBLES["tied_with_a_head_of_its_own"]])
    assert "in spite of" in verdict.problem
    monkeypatch.undo()
    wrong = lambda config: {**in_both_spellings(config), "rms_norm_eps": 0.5}  # noqa: E731
    monkeypatch.setattr(pack, "in_both_spellings", wrong)
    assert "the logits are" in judge.judge([TROUBLES["no_metadata"]]).problem
