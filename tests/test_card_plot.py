"""The card's picture: its bytes, what it shows, where the card shows it, and when it is drawn again."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.artist import Artist
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from packager.card import CardTexts, render_card
from packager.card import plot as plot_module
from packager.card.choice import CachedContext
from packager.card.plot import Plot, PlotPoint, draw_picture, in_words, plot_of
from packager.errors import MachineError, StateError
from packager.pipeline import cards, flow
from packager.receipt import PICTURE_FILES, Provenance
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from tests import card_fixtures as fixtures
from tests import tiny_recipe
from tests.card_page import assert_well_formed, body
from tests.golden_files import check_golden
from tests.hypothesis_profiles import examples
from tests.import_graph import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def llama_plot() -> Plot:
    plot = plot_of(fixtures.llama_receipts(fixtures.llama_recipe()))
    assert plot is not None
    return plot


def test_a_picture_has_a_point_for_each_measured_branch() -> None:
    receipts = fixtures.llama_receipts(fixtures.llama_recipe())
    quality = receipts[2].quality
    assert quality is not None
    known = [
        receipts[0],
        receipts[1].model_copy(update={"quality": None}),
        receipts[2].model_copy(update={"quality": quality.model_copy(update={"errors": None})}),
    ]
    plot = plot_of(known)
    assert plot is not None
    assert receipts[0].quality is not None
    assert receipts[0].quality.errors is not None
    assert plot.points == (
        PlotPoint(branch="main", size_bytes=7_255_101_440, kl=0.02341, error=receipts[0].quality.errors.kl_divergence),
        PlotPoint(branch="gptq-4bit-64g-actorder_True", size_bytes=7_503_401_984, kl=0.01517, error=None),
    )
    assert plot.base_bytes == 2 * 13_015_864_320
    assert plot_of(known[:2]) is None, "one point compares nothing"


def paths(svg: bytes) -> list[tuple[float, float]]:
    """Return where the markers of an SVG are, in the order of drawing."""
    found = []
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):  # noqa: S314 - drawn by this test
        uses = group.findall(f"{SVG}use")
        # A marker alone, inside the axes: ticks and caps come in several or lie outside.
        if (group.get("clip-path") or "").startswith("url(#p") and len(uses) == 1:
            found.append((float(uses[0].get("x", "nan")), float(uses[0].get("y", "nan"))))
    return found


def test_the_points_are_where_their_figures_are() -> None:
    """Sizes and divergences are proportional to the places of the markers; a larger divergence is higher up."""
    plot = llama_plot()
    places = paths(draw_picture(plot)["quality-light.svg"])  # the ends of each bar, then the markers
    points = sorted(plot.points, key=lambda point: -point.kl)
    assert len(places) == 3 * len(points)
    centres = places[2 * len(points) :]
    ends = [places[start : start + 2] for start in range(0, 2 * len(points), 2)]
    for one, other, one_place, other_place in zip(points, points[1:], centres, centres[1:], strict=False):
        scale = (centres[-1][1] - centres[0][1]) / (points[-1].kl - points[0].kl)
        assert other_place[1] - one_place[1] == pytest.approx(scale * (other.kl - one.kl), rel=1e-3)
        wide = (centres[-1][0] - centres[0][0]) / (points[-1].size_bytes - points[0].size_bytes)
        assert other_place[0] - one_place[0] == pytest.approx(wide * (other.size_bytes - one.size_bytes), abs=1e-3)
    assert scale < 0
    for point, ((_, low), (_, high)) in zip(points, ends, strict=True):
        assert point.error is not None
        assert low - high == pytest.approx(-scale * 4 * point.error, rel=1e-3), "twice the error, both ways"


def ticks(svg: bytes, title: str) -> list[tuple[float, float]]:
    """Return the place and the value of each tick of the horizontal axis with a title."""
    _, *axes = re.split(r'<g id="matplotlib\.axis_', svg.decode())
    (axis,) = [each for each in axes if f"<!-- {title} -->" in each]
    return [
        (float(x), float(value))
        for x, value in re.findall(r'<use [^>]*x="([\d.]+)"[^>]*>.*?<!-- ([\d.]+) -->', axis, re.DOTALL)
    ]


@pytest.mark.slow
def test_memory_is_a_second_scale_of_the_size() -> None:
    plot = plot_of(fixtures.llama_receipts(fixtures.llama_recipe()), fixtures.LLAMA_CONTEXTS)
    assert plot is not None
    svg = draw_picture(plot)["quality-light.svg"]
    sizes, memory = ticks(svg, "size of the weights, GB"), ticks(svg, "VRAM at 4k, GB")
    assert min(len(sizes), len(memory)) >= 4
    (left, least), (right, most) = sizes[0], sizes[-1]
    for place, value in memory:
        size = least + (most - least) * (place - left) / (right - left)
        assert value == pytest.approx(size + fixtures.LLAMA_CONTEXTS[0].cache_bytes / 1e9, abs=1e-3)
    assert in_words(plot).replace("\u00a0", " ").endswith("fp16: 26.0 GB. VRAM at 4k is 3.36 GB more than the size.")
    assert b"VRAM" not in draw_picture(llama_plot())["quality-light.svg"]


def test_the_same_figures_give_the_same_small_files() -> None:
    drawn = draw_picture(llama_plot())
    draw_picture.cache_clear()
    assert draw_picture(llama_plot()) == drawn
    assert tuple(drawn) == PICTURE_FILES
    assert len(set(drawn.values())) == len(drawn)
    for data in drawn.values():
        assert len(data) < 100_000
        assert b"atplotlib" not in data.replace(b'id="matplotlib.axis_', b"")


@pytest.mark.slow
def test_the_same_figures_give_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from packager.card.plot import *; from tests import card_fixtures as made\n"
        "plot = plot_of(made.llama_receipts(made.llama_recipe()))\n"
        "for name, data in draw_picture(plot).items(): (Path(sys.argv[1]) / name).write_bytes(data)"
    )
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nsavefig.dpi: 10\n")  # a user's own, which changes nothing
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True, env=_environ(tmp_path))
    for name, data in draw_picture(llama_plot()).items():
        assert data == (tmp_path / name).read_bytes(), name


def _environ(folder: Path) -> dict[str, str]:
    import os

    return {**os.environ, "MATPLOTLIBRC": str(folder)}


@pytest.mark.slow
def test_values_of_other_orders_of_magnitude_are_told_apart() -> None:
    def heights(*values: float) -> list[float]:
        points = tuple(
            PlotPoint(branch=str(kl), size_bytes=10**9 + number, kl=kl, error=None) for number, kl in enumerate(values)
        )
        return [
            height for _, height in paths(draw_picture(Plot(points=points, base_bytes=10**10))["quality-light.svg"])
        ]

    steps = heights(0.1, 0.01, 0.001)
    assert steps[1] - steps[0] == pytest.approx(steps[2] - steps[1], rel=1e-3), "a logarithmic axis"
    steps = heights(0.3, 0.2, 0.1)
    assert steps[1] - steps[0] == pytest.approx(steps[2] - steps[1], rel=1e-3), "a linear axis"
    assert len(heights(0.1, 0.0)) == 2, "the divergence of a branch that is the model itself"


def drawn_figure(plot: Plot) -> Figure:
    """Return the figure of a picture, laid out as for drawing."""
    figures: list[Figure] = []

    def lay_out(figure: Figure, *_: Any, **__: Any) -> None:
        if not figures:  # the others have the same figures
            figure.draw_without_rendering()
            figures.append(figure)

    draw_picture.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lay_out)
        draw_picture(plot)
    draw_picture.cache_clear()
    return figures[0]


def under_fp16(figure: Figure) -> tuple[float, list[object]]:
    """Return how many pixels above the bottom of the axes a picture names the fp16 model, and what lies under the name.

    That is markers, bars and words. The axes cut off what of a bar lies outside.
    """
    (axes,) = figure.axes
    texts = [each for each in figure.findobj(Text) if isinstance(each, Text) and each.get_text()]
    (name,) = [each for each in texts if each.get_text().startswith("fp16: ")]
    place = name.get_window_extent()
    found: list[object] = [each.get_text() for each in texts if each is not name and place.overlaps(_extent(each))]
    if inside := Bbox.intersection(place, axes.bbox):
        found += [line for line in axes.lines if inside.overlaps(_extent(line))]
        bars = [bar for each in axes.collections if isinstance(each, LineCollection) for bar in each.get_segments()]
        found += [bar for bar in bars if inside.overlaps(Bbox(axes.transData.transform(bar)))]
    return place.y0 - axes.bbox.y0, found


def _extent(artist: Artist) -> Bbox:
    return artist.get_window_extent()


def demo_plot(*others: tuple[int, float, float | None]) -> Plot:
    """Return the demo's figures with those of other branches: bytes, KL divergence, its standard error."""
    figures = [
        (2_961_880, 2.352e-4, 1.158e-5), (3_169_264, 1.956e-4, 9.99e-6), (3_031_000, 2.188e-4, 1.042e-5),
        (2_961_880, 2.537e-4, 1.297e-5), *others,
    ]  # fmt: skip
    points = (
        PlotPoint(branch=f"{number}", size_bytes=size, kl=kl, error=error)
        for number, (size, kl, error) in enumerate(figures)
    )
    return Plot(points=tuple(points), base_bytes=8_133_120, context=CachedContext(tokens=512, cache_bytes=1_572_864))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((4_745_280, 1.002e-6, 4.753e-8), id="8 bits: a logarithmic axis"),
        pytest.param((4_745_280, 1.2e-5, None), id="a linear axis"),
        pytest.param((4_400_000, 3e-5, 1.4e-5), id="the bar alone"),
        pytest.param((4_745_280, 1e-6, 1e-5), id="a bar to less than 0"),
    ],
)
def test_a_branch_in_the_corner_is_not_under_the_name_of_fp16(other: tuple[int, float, float | None]) -> None:
    height, found = under_fp16(drawn_figure(demo_plot(other)))
    assert found == []
    assert height < -20, "below the axes and the numbers of their ticks"


def test_sizes_that_differ_little_leave_the_name_of_fp16_alone() -> None:
    """matplotlib writes what the ticks have in common on the line of the axis's title."""
    points = tuple(
        PlotPoint(branch=str(size), size_bytes=size, kl=kl, error=None)
        for size, kl in ((2_961_880, 2e-4), (2_961_890, 1e-6))
    )
    figure = drawn_figure(Plot(points=points, base_bytes=8_133_120))
    assert figure.axes[0].xaxis.get_offset_text().get_text()
    assert under_fp16(figure)[1] == []


@pytest.mark.parametrize("plot", [llama_plot(), demo_plot(), demo_plot((4_745_280, 0.0, None))])
def test_a_free_corner_has_the_name_of_fp16(plot: Plot) -> None:
    figure = drawn_figure(plot)
    height, found = under_fp16(figure)
    assert found == []
    assert height == pytest.approx(16, abs=4)
    assert figure.axes[0].xaxis.label.get_horizontalalignment() == "center"


@pytest.mark.slow
@settings(max_examples=examples(25))
@given(
    st.lists(
        st.tuples(st.integers(10**5, 10**12), st.floats(1e-9, 10), st.none() | st.floats(1e-9, 1)),
        min_size=2, max_size=12,
    )
)  # fmt: skip
def test_nothing_is_under_the_name_of_fp16(figures: list[tuple[int, float, float | None]]) -> None:
    points = tuple(
        PlotPoint(branch=f"branch-{number}", size_bytes=size, kl=kl, error=error)
        for number, (size, kl, error) in enumerate(figures)
    )
    context = CachedContext(tokens=4096, cache_bytes=10**9)
    assert under_fp16(drawn_figure(Plot(points=points, base_bytes=10**13, context=context)))[1] == []


def test_the_alternative_text_has_the_figures() -> None:
    words = in_words(llama_plot()).replace("\u00a0", " ")
    assert words.startswith("Size of the weights against KL divergence from fp16. main: 7.26 GB, KL 0.0234 ± 0.0011; ")
    assert words.endswith("gptq-4bit-128g-actorder_True: 7.26 GB, KL 0.01833 ± 0.00084; fp16: 26.0 GB.")


def test_the_card_shows_its_picture(update_golden: bool) -> None:
    recipe = fixtures.llama_recipe()
    receipts = fixtures.llama_receipts(recipe)
    given: dict[str, Any] = {"contexts": fixtures.LLAMA_CONTEXTS, "expectations": fixtures.llama_expectations(recipe)}
    text = render_card(recipe, CardTexts(), receipts, "llama", "main", plot=llama_plot(), **given)
    assert_well_formed(text)
    without = render_card(recipe, CardTexts(), receipts, "llama", "main", **given)
    section = text[text.index("<picture>") : text.index("* `main`: 4-bit")]
    assert text.replace(section, "") == without
    check_golden("cards/fixture_llama_picture.md", text, update=update_golden)
    page = MarkdownIt("commonmark", {"html": True}).render(body(text))
    assert [name for name in PICTURE_FILES if f'"{name}"' not in page] == []


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw_picture.cache_clear()
    with pytest.raises(MachineError, match="the card's picture cannot be drawn") as caught:
        draw_picture(llama_plot())
    assert caught.value.hint == "pip install 'gptq-packager[build]'"


@pytest.mark.slow
def test_the_card_imports_no_matplotlib() -> None:
    script = "import sys, packager.card, packager.pipeline.flow; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.slow
def test_a_picture_is_drawn_again_only_when_its_figures_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RecipeFile.load(tiny_recipe.write_all(tmp_path))
    dist = tmp_path / "dist"
    tiny_recipe.build(recipe, dist)
    folders = [tiny_recipe.workspace(dist).folder(branch) for branch in tiny_recipe.BRANCHES]
    pictures = [{name: (folder / name).read_bytes() for name in PICTURE_FILES} for folder in folders]
    assert pictures[0] == pictures[1] == pictures[2]
    for folder in folders:
        record = Provenance.model_validate_json((folder / "provenance.json").read_bytes())
        assert set(PICTURE_FILES) < set(record.files)

    def refuse(_: Plot) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(cards, "draw_picture", refuse)
    flow.render(recipe, tiny_recipe.options(dist), Terminal(quiet=True), branch="main")
    monkeypatch.setattr(cards, "PLOT_VERSION", plot_module.PLOT_VERSION + 1)
    with pytest.raises(AssertionError, match="drawn again"):
        flow.render(recipe, tiny_recipe.options(dist), Terminal(quiet=True), branch="main")
    (folders[1] / PICTURE_FILES[0]).write_bytes(b"mine")
    monkeypatch.setattr(cards, "draw_picture", lambda _: pictures[0])
    with pytest.raises(StateError, match=r"quality-light\.png was edited by hand"):
        flow.render(recipe, tiny_recipe.options(dist), Terminal(quiet=True), branch="main")
