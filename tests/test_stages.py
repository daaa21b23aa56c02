"""The stages of a build where no other test file covers them."""

import subprocess
import sys


def test_loaders_can_be_imported_without_the_modules_of_posix() -> None:
    script = (
        "import sys; sys.modules.update(fcntl=None, resource=None)\n"
        "import packager.pipeline.plan, packager.prove.environments, packager.prove.probes"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
