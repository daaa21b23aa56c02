"""The command line: its commands, and the only code that catches errors and sets exit codes.

Results go to standard output (`--format json` for machines), progress and errors to standard error. Each command
imports what it needs in its body: `--help` imports nothing heavier than typer.
"""

import io
import os
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from packager import __version__
from packager.cli.auditing import audit_command
from packager.cli.choosing import choose_command
from packager.cli.compat import compat_command
from packager.cli.diff_view import diff_command
from packager.cli.doctor import doctor_command
from packager.cli.init import init_command
from packager.cli.locking import lock_command
from packager.cli.options import terminal_of
from packager.cli.publishing import publish_command, rollback_command, verify_published_command
from packager.cli.queue_command import queue_command
from packager.cli.recipe_commands import (
    build_command,
    card_command,
    plan_command,
    status_command,
    verify_command,
)
from packager.cli.releasing import release_command
from packager.cli.repairing import fix_command
from packager.cli.report_command import report_command
from packager.cli.schema_command import schema_command
from packager.cli.signals import end_command, raise_on_signals
from packager.cli.usage import UsageMistake, usage_error
from packager.cli.voice import begin, report, spoken
from packager.errors import PATH_REFUSALS, PackagerError, path_refusal
from packager.inputs.hub_endpoint import require_endpoint
from packager.model.devices import GPU_ALLOCATION

# pydantic's search for plugins reads the metadata of every installed package: 25 of 500 ms of `plan`, for no plugin.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
os.environ.setdefault(*GPU_ALLOCATION)
# Servers other than the Hub's own do not know the Xet protocol, and the client uses it without asking.
if os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") != "https://huggingface.co":
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
# The Hub client draws progress bars even where output is not a terminal.
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

_EPILOG = """
\b
Exit codes:
  0   success
  1   `lock --check`: a lock is not what would be written
  2   the command line or the recipe is wrong
  3   the base model cannot be read, or is not the one in the recipe
  4   the calibration or evaluation text cannot be used
  5   a linear cannot be quantized
  6   a checkpoint folder cannot be written
  7   a checkpoint folder or a published branch fails its audit
  8   a loader failed, or computed other values
  9   the model card cannot be rendered
  10  the publishing target refused, or a variant is not ready for it
  11  a file in the output folder was edited, or another run is in progress
  12  this machine lacks something: a GPU, memory, disk space, git, a package
  129 ended by SIGHUP: the terminal was closed
  130 interrupted by Ctrl-C
  143 ended by SIGTERM: a CI job was cancelled, for example

A first run, on any machine: packager release recipes/demo-llama.yaml
"""


class _Commands(TyperGroup):
    """Turn the errors of commands, and mistakes in the command line, into messages and exit codes."""

    def main(self, *arguments: Any, **options: Any) -> Any:  # typer calls it with names alone
        """Run the command line and end the process."""
        words = options.get("args")
        begin(sys.argv[1:] if words is None else words)
        standalone_mode = options.get("standalone_mode", True)
        # The name is that of messages, however this was started.
        options |= {"prog_name": "packager", "standalone_mode": False}
        try:
            code = super().main(*arguments, **options)
        except UsageMistake as mistake:
            code = _usage_mistake(mistake)
        except typer.Abort:
            sys.stderr.write("ended: the question was not answered\n")
            code = 130
        if standalone_mode:
            sys.exit(code or 0)
        return code

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Read the command line."""
        try:
            return super().make_context(*arguments, **options)
        except KeyboardInterrupt as error:  # typer would take every signal for Ctrl-C, and say nothing
            raise typer.Exit(end_command(error)) from None

    def invoke(self, ctx: Any) -> Any:  # typer's releases disagree on the module of Context
        """Run the command."""
        try:
            require_endpoint(os.environ)
            return super().invoke(ctx)
        except PackagerError as error:
            raise _reported(error) from error
        except PATH_REFUSALS as error:
            refusal = path_refusal(error)
            if refusal is None:
                raise
            raise _reported(refusal) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(end_command(error)) from None


def _usage_mistake(mistake: Any) -> int:
    if type(mistake).__name__ == "NoArgsIsHelpError":  # `packager` alone: click 8.2 and newer
        mistake.show()
        return int(mistake.exit_code)
    error = usage_error(mistake)
    report(error)
    return error.exit_code


def _reported(error: PackagerError) -> typer.Exit:
    report(error)
    return typer.Exit(error.exit_code)


app = typer.Typer(
    name="packager",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: half the time of boxes, and the same text at every width
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)


def _version(wanted: bool) -> None:
    if wanted:
        terminal_of().write(f"packager {__version__}\n")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn an fp16 language model into a published repository of GPTQ variants, one branch per variant.

    A recipe, a YAML file, names the base model, the calibration text and the variants. `init` writes the first one of a
    model, `lock` writes down what the base model is, `plan` shows what a recipe means, `build` quantizes, measures and
    verifies the variants and writes their model cards, `publish` makes the branches; `release` builds and publishes.
    Every command can be interrupted and run again.
    """


_COMMANDS: Mapping[str, Callable[..., None]] = {
    "init": init_command,
    "lock": lock_command,
    "plan": plan_command,
    "build": build_command,
    "audit": audit_command,
    "fix": fix_command,
    "compat": compat_command,
    "verify": verify_command,
    "card": card_command,
    "diff": diff_command,
    "report": report_command,
    "publish": publish_command,
    "verify-published": verify_published_command,
    "choose": choose_command,
    "rollback": rollback_command,
    "status": status_command,
    "queue": queue_command,
    "release": release_command,
    "doctor": doctor_command,
    "schema": schema_command,
}
_WITH_EVENTS = ("build", "release")  # what takes hours
for _name, _command in _COMMANDS.items():
    app.command(_name)(spoken(_command, with_events=_name in _WITH_EVENTS))


def main() -> None:
    """Entry point of the `packager` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe on Windows has 256 characters
            stream.reconfigure(errors="backslashreplace")
    try:
        raise_on_signals()
        app()
    except KeyboardInterrupt as error:  # while typer reads the options of the commands
        sys.exit(end_command(error))
