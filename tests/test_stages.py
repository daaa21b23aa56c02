"""The stages of a build where no other test file covers them."""

import subprocess
import sys

import pytest

from packager.pipeline.stages import peak_memory_bytes
from tests.import_graph import ROOT

# Modules of POSIX systems: the base install plans and checks on systems without them too.
WITHOUT_POSIX = "import sys; sys.modules.update(fcntl=None, resource=None)\n"


def test_loaders_can_be_imported_without_the_modules_of_posix() -> None:
    script = f"{WITHOUT_POSIX}import packager.pipeline.plan, packager.prove.environments, packager.prove.probes"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_stage_of_a_build_can_be_imported_without_the_modules_of_posix() -> None:
    script = f"{WITHOUT_POSIX}import packager.pipeline.flow, packager.pipeline.stages, packager.pipeline.release"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "--help"], ["plan", "recipes/llama-2-13b-chat.yaml"]], ids=" ".join
)
def test_plan_and_help_run_without_the_modules_of_posix(arguments: list[str]) -> None:
    script = f"{WITHOUT_POSIX}from packager.cli.main import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_peak_memory_is_that_of_this_process() -> None:
    peak = peak_memory_bytes()
    block = bytearray(peak + 1_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory_bytes() > peak > 10_000_000
