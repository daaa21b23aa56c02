"""The card's picture: size and memory of each branch against its KL divergence, as PNG and SVG, light and dark.

The same figures give the same bytes: no date, no name of a program, ids from a fixed salt, the font of matplotlib.
"""

import io
import operator
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

from packager.card.choice import CachedContext
from packager.card.numbers import measured, short_size, size_unit
from packager.errors import MachineError
from packager.receipt import PICTURE_FILES, Provenance
from packager.system.text import BYTE_UNITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

# Raise it when the picture of the same figures changes: finished cards get the new one then.
PLOT_VERSION = 3
_INCHES = (8.0, 4.0)
# Left, bottom, width and height of the axes, as fractions; the legend stands at their right. A layout that matplotlib
# computes takes twice the time, and a build in the tests draws too.
_AXES = (0.13, 0.13, 0.52, 0.73)
_LEGEND_CHARACTERS = 34
_DPI = 144
# A logarithmic axis where a linear one would show the small values as one line.
_LOG_RATIO = 20
# Points (1/72 inch) of a marker's width, of half an error bar's cap, and of the space around either.
_MARKER, _CAP, _SPACE = 7.0, 4.0, 3.0
_MARKERS = "osD^vPX<>*"
# Okabe and Ito's colours, which colour-blind readers tell apart; yellow is left out, which a white page swallows.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C8C8C")


@dataclass(frozen=True, kw_only=True)
class Theme:
    """The colours of a page."""

    text: str
    grid: str
    page: str


_THEMES: Mapping[str, Theme] = {
    "light": Theme(text="#1f2328", grid="#d1d9e0", page="#ffffff"),
    "dark": Theme(text="#e6edf3", grid="#3d444d", page="#0d1117"),
}


@dataclass(frozen=True, kw_only=True)
class PlotPoint:
    """A branch: its bytes, its mean KL divergence in nats, and its standard error, None where it is not known."""

    branch: str
    size_bytes: int
    kl: float
    error: float | None


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What a picture shows: the measured branches, the bytes of the fp16 model, and a context whose cache is added."""

    points: tuple[PlotPoint, ...]
    base_bytes: int
    context: CachedContext | None = None


def plot_of(receipts: Sequence[Provenance], contexts: Sequence[CachedContext] = ()) -> Plot | None:
    """Return the picture of a repository; None for fewer than two measured branches, which it would not compare.

    The first of the contexts is that of the memory's axis.
    """
    points = tuple(
        PlotPoint(
            branch=receipt.branch,
            size_bytes=receipt.weights_bytes,
            kl=receipt.quality.kl_divergence,
            error=receipt.quality.errors.kl_divergence if receipt.quality.errors else None,
        )
        for receipt in receipts
        if receipt.quality is not None
    )
    if len(points) < 2:
        return None
    context = contexts[0] if contexts else None
    return Plot(points=points, base_bytes=2 * receipts[0].base_model.num_parameters, context=context)


@cache
def draw_picture(plot: Plot) -> Mapping[str, bytes]:
    """Return the files of a picture by name: see `PICTURE_FILES`.

    Raises:
        MachineError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MachineError(
            "the card's picture cannot be drawn", why=str(error), hint="pip install 'gptq-packager[build]'"
        ) from error
    files = {}
    for name in PICTURE_FILES:
        mode, _, kind = name.removeprefix("quality-").partition(".")
        theme = _THEMES[mode]
        # Whatever the user's own matplotlibrc says.
        with style.context(_settings(theme), after_reset=True), mpl.rc_context({"svg.hashsalt": name}):
            figure = Figure(figsize=_INCHES, dpi=_DPI, facecolor=theme.page)
            _fill(figure, plot, theme)
            files[name] = _saved(figure, "svg" if kind == "svg" else "png")
    return files


def _settings(theme: Theme) -> dict[str, Any]:
    colours = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(colours, theme.text),
        "font.family": "DejaVu Sans",
        "axes.facecolor": theme.page,
        "axes.edgecolor": theme.grid,
        "grid.color": theme.grid,
        "svg.fonttype": "path",
        "font.size": 9.5,
    }


def _fill(figure: "Figure", plot: Plot, theme: Theme) -> None:
    axes = figure.add_axes(_AXES)
    unit = size_unit(max(point.size_bytes for point in plot.points))
    factor = BYTE_UNITS[unit]
    for number, point in enumerate(sorted(plot.points, key=lambda point: (-point.kl, point.branch))):
        twice = None if point.error is None else 2 * point.error
        axes.errorbar(
            point.size_bytes / factor, point.kl, yerr=twice, linestyle="", capsize=_CAP, markersize=_MARKER,
            label=textwrap.fill(point.branch, _LEGEND_CHARACTERS),
            color=_COLOURS[number % len(_COLOURS)], marker=_MARKERS[number % len(_MARKERS)],
        )  # fmt: skip
    axes.set_xlabel(f"size of the weights, {unit}")
    axes.set_ylabel("KL divergence from fp16, nats")
    axes.grid(visible=True, linewidth=0.6)
    axes.set_axisbelow(True)
    _scale(axes, plot)
    axes.margins(x=0.12)
    _name_fp16(axes, plot, theme, factor)
    if plot.context is not None:
        # Every branch caches the same: memory is another scale of the same axis.
        cached = plot.context.cache_bytes / factor
        above = axes.secondary_xaxis("top", functions=(partial(operator.add, cached), partial(operator.add, -cached)))
        above.set_xlabel(f"VRAM at {plot.context.title}, {unit}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=8.5)


def _scale(axes: "Axes", plot: Plot) -> None:
    """Let a linear axis begin at 0, the fp16 model; take a logarithmic one for values of other orders of magnitude."""
    least, most = (choose(point.kl for point in plot.points) for choose in (min, max))
    if least > 0 and most > _LOG_RATIO * least:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)


def _name_fp16(axes: "Axes", plot: Plot, theme: Theme, factor: int) -> None:
    """Write where the fp16 model lies: in the lower right corner of the axes, or below them if a branch is there.

    The axis's title, which is on the same line below, goes to the left then.
    """
    name = axes.annotate(
        f"fp16: {short_size(plot.base_bytes)}, KL 0 \u2192", xy=(1.0, 0.0), xytext=(-8, 8), xycoords="axes fraction",
        textcoords="offset points", ha="right", va="bottom", color=theme.text, fontsize=9,
    )  # fmt: skip
    written = name.get_window_extent()
    if any(written.overlaps(branch) for branch in _branches(axes, plot, factor)):
        name.remove()
        axes.set_xlabel(axes.get_xlabel(), loc="left")
        # At the left of what matplotlib writes there if sizes differ little, such as "1e-5+2.96".
        axes.annotate(
            name.get_text(), xy=(0.0, 0.5), xycoords=(axes.xaxis.offsetText, axes.xaxis.label), xytext=(-8, 0),
            textcoords="offset points", ha="right", va="center", color=theme.text, fontsize=9,
        )  # fmt: skip


def _branches(axes: "Axes", plot: Plot, factor: int) -> "Iterator[Bbox]":
    """Yield what each branch covers in pixels: its marker, and its error bar with the caps, with space around them."""
    from matplotlib.transforms import Bbox

    axes.autoscale_view()  # the limits of the axes, which are computed late otherwise
    pixels_per_point = _DPI / 72
    for point in plot.points:
        ends = [point.kl + sign * 2 * (point.error or 0.0) for sign in (-1, 1)]
        (x, low), (_, high) = axes.transData.transform([(point.size_bytes / factor, end) for end in ends])
        wide, tall = ((size + _SPACE) * pixels_per_point for size in (max(_CAP, _MARKER / 2), _MARKER / 2))
        yield Bbox.from_extents(x - wide, low - tall, x + wide, high + tall)


def _saved(figure: "Figure", kind: Literal["svg", "png"]) -> bytes:
    # Neither the time nor the version of a program.
    nothing = ("Creator", "Date", "Format", "Type") if kind == "svg" else ("Software",)
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, metadata=dict.fromkeys(nothing))
    return stream.getvalue()


def in_words(plot: Plot) -> str:
    """Return what a picture shows, for those who do not see it."""
    shown = [
        f"{point.branch}: {short_size(point.size_bytes)}, KL {measured(point.kl, point.error)}" for point in plot.points
    ]
    words = (
        f"Size of the weights against KL divergence from fp16. {'; '.join(shown)}; fp16: {short_size(plot.base_bytes)}."
    )
    if plot.context is None:
        return words
    return f"{words} VRAM at {plot.context.title} is {short_size(plot.context.cache_bytes)} more than the size."
