"""The bar of a stage at three widths: its numbers stay whole."""

import io
import re

import pytest
from rich.console import Console

from packager.system.progress_bar import new_progress

TEXT = "  gptq-4bit-128g-actorder_True block 24/40 loss 0.000123 3.2 s"


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("total", [4, 1000])
def test_the_numbers_of_a_bar_stay_whole_and_the_text_is_cut(width: int, total: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    progress = new_progress(console)
    task = progress.add_task(TEXT, total=total, completed=total // 2)
    progress.tasks[0].start_time, progress.tasks[0].stop_time = 0.0, 45_296.0
    console.print(progress.get_renderable())
    assert progress.tasks[0].id == task
    (line,) = stream.getvalue().splitlines()
    assert len(line.rstrip()) <= width
    assert re.search(rf" {total // 2}/ ?{total} 12:34:56 \S*:\S\S ", line)
    assert "gptq-4bit" in line
    assert line.rstrip().endswith("3.2 s" if width == 120 else "…")
    assert len(re.findall("[━╸╺]", line)) >= 8


def test_a_text_is_never_read_as_markup() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=True, color_system=None)
    progress = new_progress(console)
    progress.add_task("[bold]x[/bold] [/nothing]", total=1)
    console.print(progress.get_renderable())
    assert "[bold]x[/bold] [/nothing]" in stream.getvalue()
