"""The developer and release interface; CI calls nothing else. `nox -l` lists the sessions.

Versions come from constraints.txt, so that a session today and one next year install the same packages.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "typecheck", "schema", "docs", "tests"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_external_run = True

HERE = Path(__file__).parent
CONSTRAINTS = "constraints.txt"
DEMO = "recipes/demo-llama.yaml"
RECIPES = sorted(str(path.relative_to(HERE)) for path in (HERE / "recipes").glob("*.yaml"))


def _install(session: nox.Session, *packages: str) -> None:
    """Install into the session's environment, unless exactly this is what it holds already."""
    wanted = [*packages, (HERE / CONSTRAINTS).read_text(), (HERE / "pyproject.toml").read_text()]
    digest = hashlib.sha256("\n".join(wanted).encode()).hexdigest()
    stamp = Path(session.virtualenv.location) / "installed.sha256"
    if "." not in packages and stamp.exists() and stamp.read_text() == digest:
        return
    session.install("-c", CONSTRAINTS, *packages)
    stamp.write_text(digest)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style with ruff (`-- --fix` mends what can be mended)."""
    _install(session, "ruff")
    session.run("ruff", "check", *session.posargs, ".")
    session.run("ruff", "format", *([] if "--fix" in session.posargs else ["--check"]), ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check types with mypy, strict."""
    _install(session, "-e", ".[build]", "mypy", "nox", "types-greenlet")
    session.run("mypy")


@nox.session
def schema(session: nox.Session) -> None:
    """Check that the recipes' JSON schema is in step with the models (`-- --write` renews it)."""
    _install(session, "-e", ".")
    action = "--write" if "--write" in session.posargs else "--check"
    session.run("python", "-m", "packager.recipe.schema", action, "recipes/recipe.schema.json")


@nox.session
def docs(session: nox.Session) -> None:
    """Check that the pages of docs/reference are in step with the code (`-- --write` renews them)."""
    _install(session, "-e", ".")
    action = "--write" if "--write" in session.posargs else "--check"
    session.run("python", "docs/generate.py", action)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the test suite; no GPU, no token, no network. Arguments after `--` go to pytest."""
    # A CUDA build of torch brings Triton; a CPU build does not, and runs its kernels in the interpreter.
    triton = 'triton; sys_platform == "linux"'
    _install(session, "-e", ".[build]", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "jsonschema", triton)
    workers = [] if any(argument.startswith("-n") for argument in session.posargs) else ["-n", str(os.cpu_count() or 1)]
    session.run("pytest", *workers, *session.posargs)


@nox.session(name="tests-gpu")
def tests_gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA GPU; without one they fail, they do not skip."""
    _install(session, "-e", ".[build]", "pytest", "pytest-timeout", "hypothesis", "jsonschema")
    session.run("pytest", "-m", "gpu", *session.posargs)


@nox.session(name="tests-base")
def tests_base(session: nox.Session) -> None:
    """Prove that plan, audit, card, publish and status work in the base install, which has no torch."""
    _install(session, ".", "pytest")
    session.run("python", "-c", "import importlib.util as u; assert u.find_spec('torch') is None")
    session.run("packager", "plan", "recipes/llama-2-13b-chat.yaml", silent=True)
    session.run("packager", "status", DEMO, silent=True)


@nox.session(name="build-all")
def build_all(session: nox.Session) -> None:
    """Build and publish every recipe that this machine can build; `-- --strict` makes a skipped one a failure."""
    _install(session, "-e", ".[build]")
    session.run("packager", "release", *RECIPES, *session.posargs)


@nox.session(name="tests-release")
def tests_release(session: nox.Session) -> None:
    """Read the published demo as its readers would, run its card's code, ask the loaders. Needs build-all."""
    # Another olah may need other corrections than those in tests/local_hub.py.
    _install(session, "-e", ".[build]", "pytest", "olah==0.5.4")
    files = ("test_release", "test_auto_gptq", "test_loaders_of_architectures")
    session.run("pytest", "-m", "release", *(f"tests/{name}.py" for name in files), *session.posargs)


@nox.session(name="tests-publish")
def tests_publish(session: nox.Session) -> None:
    """Publish through git-lfs to real servers, and clone by the cards' commands; without git-lfs it fails."""
    if shutil.which("git-lfs") is None:
        session.error(
            "git-lfs is not on the PATH: apt-get install git-lfs, brew install git-lfs, or https://git-lfs.com"
        )
    _install(session, "-e", ".[build]", "pytest")
    files = ("test_git_lfs", "test_card_commands")
    python = _giftless(session)
    command = ("pytest", "-m", "release", *(f"tests/{name}.py" for name in files), *session.posargs)
    session.run(*command, env={"GIFTLESS_PYTHON": str(python)})


def _giftless(session: nox.Session) -> Path:
    """Return the Python of giftless, an LFS server that needs packages older than ours."""
    wanted = HERE / "tests" / "giftless.txt"
    folder = Path(session.virtualenv.location).absolute() / "giftless"
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if not stamp.exists() or stamp.read_text() != wanted.read_text():
        session.run("python", "-m", "venv", "--clear", str(folder))
        session.run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(wanted), external=True)
        stamp.write_text(wanted.read_text())
    return python


@nox.session
def benchmark(session: nox.Session) -> None:
    """Time our engine and, where installed, others on one random model; benchmarks/README.md has the options."""
    _install(session, "-e", ".[build]")
    session.run("python", "benchmarks/speed.py", *session.posargs)


@nox.session(name="benchmark-quality")
def benchmark_quality(session: nox.Session) -> None:
    """Measure what our engine and others make of the demo model; benchmarks/README.md has the options."""
    _install(session, "-e", ".[build]")
    session.run("python", "benchmarks/quality.py", *session.posargs)


@nox.session(name="benchmark-engines")
def benchmark_engines(session: nox.Session) -> None:
    """Build the demo's variants with both engines, ours and AutoGPTQ, and compare losses and quality; needs a GPU."""
    _install(session, "-e", ".[build]")
    session.run("python", "benchmarks/compare_engines.py", *session.posargs)


@nox.session
def plan(session: nox.Session) -> None:
    """Show what every recipe means: branches, sizes, memory, disk, loaders; offline."""
    _install(session, "-e", ".")
    for recipe in RECIPES:
        session.run("packager", "plan", recipe, *session.posargs)


@nox.session(name="train-demo")
def train_demo(session: nox.Session) -> None:
    """Train the demo model again (minutes on a GPU, hours without) into recipes/assets/demo-llama."""
    _install(session, "-e", ".[build]")
    session.run("python", "recipes/assets/demo-llama/train.py", "--out", "recipes/assets/demo-llama", *session.posargs)


if __name__ == "__main__":
    sys.exit("run nox, not this file: nox -l lists the sessions")
