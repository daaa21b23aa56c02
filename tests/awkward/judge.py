"""Build a base model with troubles in this process, and judge the outcome."""

import json
import math
import os
import shutil
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub import constants
from tokenizers import Tokenizer

from packager.errors import PackagerError, RecipeError
from packager.inputs import describe_in_child
from packager.inputs.limits import ModelProcess
from packager.pipeline import flow, quantize_stage
from packager.pipeline.lock_recipes import lock_recipes
from packager.prove import evaluate
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from tests.awkward import (  # noqa: F401 - their troubles are registered
    base_configs,
    dataset_rows,
    generation_configs,
    layouts,
    texts,
    tokenizers_and_templates,
    weights_files,
)
from tests.awkward.scene import DATASET, PRIVATE, Case, Scene, Trouble, made
from tests.awkward.transformers_view import TEXTS, View, opened, perplexity, view_of_base, view_of_branch
from tests.tiny_recipe import options, workspace

MOST_SECONDS = 30.0
_MOST_TEXT = 6000
# Of 8 bits; what is lost or misread makes tens of percent.
_NEAR = 0.05
_SAME = 1e-3
# Their texts hold start tokens.
_OWN_TEXTS = frozenset({"text_with_special_tokens"})


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a case.

    Attributes:
        ended: "built", "refused", "clash" where the troubles do not combine.
        problem: why that is wrong; "" if it is right.
        said: the refusal.
        seconds: how long it took.
    """

    ended: str
    problem: str = ""
    said: str = ""
    seconds: float = 0.0


class Judge:
    """Builds cases one after the other, with the costly parts shared; use it in a block.

    Args:
        folder: for the scene and the cases.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._computing = False
        self._texts: Any = None
        self._base: Any = None

    def __enter__(self) -> "Judge":
        with ExitStack() as stack:
            self.scene = Scene(self._folder / "scene")
            stack.enter_context(_shared_process())
            stack.enter_context(patch.object(describe_in_child, "_run", _described_here))
            stack.enter_context(
                patch.object(quantize_stage, "_quantize", self._noting_quantize(quantize_stage._quantize))
            )
            stack.enter_context(patch.object(evaluate, "run_base", self._noting_texts(evaluate.run_base)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def judge(self, troubles: Sequence[Trouble]) -> Verdict:
        """Make troubles in a copy of the scene, build it, and return the verdict."""
        started = time.monotonic()
        case = self.scene.copy("case")
        try:
            if not made(case, troubles):
                return Verdict(ended="clash")
            verdict = self._ended(case, troubles)
        finally:
            shutil.rmtree(case.folder, ignore_errors=True)
        seconds = time.monotonic() - started
        problem = verdict.problem
        if not problem and seconds > MOST_SECONDS:
            problem = f"it took {seconds:.0f} s"
        return Verdict(ended=verdict.ended, problem=problem, said=verdict.said, seconds=seconds)

    def _ended(self, case: Case, troubles: Sequence[Trouble]) -> Verdict:
        recipe, dist = case.write_recipe(), case.folder / "dist"
        self._computing, self._texts = False, None
        quiet = Terminal(quiet=True)
        try:
            with warnings.catch_warnings(), patch.object(constants, "HF_HUB_CACHE", str(case.cache)):
                warnings.simplefilter("ignore")
                list(lock_recipes([recipe], lambda _: None))
                flow.build(RecipeFile.load(recipe), options(dist), quiet)
        except PackagerError as error:
            return Verdict(ended="refused", problem=self._refusal(case, troubles, error), said=str(error))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return Verdict(ended="traceback", problem="".join(traceback.format_exception(error))[-2500:])
        wanted = [each.name for each in troubles if each.ends == "refused"]
        if wanted:
            return Verdict(ended="built", problem=f"built in spite of {wanted}")
        branch = workspace(dist).folder("main")
        quality = json.loads((branch / "provenance.json").read_bytes())["quality"]
        return Verdict(ended="built", problem=self._difference(case, troubles, branch, quality))

    def _refusal(self, case: Case, troubles: Sequence[Trouble], error: PackagerError) -> str:
        """Return what is wrong with a refusal."""
        text = str(error)
        hinted = bool(error.hint) or (isinstance(error, RecipeError) and any(each.hint for each in error.problems))
        words = [word for each in troubles for word in each.says if each.ends != "builds"]
        wrong = {
            "refused after the first block was quantized": self._computing and not any(each.late for each in troubles),
            "refused, though transformers takes it": all(each.ends == "builds" for each in troubles),
            f"the refusal has {len(text)} characters": len(text) > _MOST_TEXT,
            "the refusal names no way out": not hinted,
            "the refusal names no file": not any(name in text for name in _names(case)),
            f"the refusal names none of {words}": bool(words) and not any(word in text for word in words),
        }
        return next((story for story, holds in wrong.items() if holds), "")

    def _difference(self, case: Case, troubles: Sequence[Trouble], branch: Path, quality: Any) -> str:
        """Return how a branch differs from what transformers makes of the base model."""
        rows = self._texts.evaluation.ids
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base, own = (
                opened(lambda: view_of_base(case.model, rows)),
                opened(lambda: view_of_branch(branch, rows)),
            )
        if isinstance(own, str):
            return f"transformers does not open the branch: {own}"
        if isinstance(base, View):
            # Classes of transformers make other tokens of a tokenizer.json than the file says: decision 19.
            as_the_file = not _tokens_of_the_file(case.model, own)
            if problem := _compared(base, own, rows, quality, same_tokens=not as_the_file):
                return problem
        if abs(perplexity(own.logits, rows) / quality["perplexity"] - 1) > _SAME:
            return f"perplexity {quality['perplexity']}, by transformers {perplexity(own.logits, rows)}"
        return self._rows_problem(own, troubles) or _file_problem(branch) or _tokens_of_the_file(branch, own)

    def _rows_problem(self, own: View, troubles: Sequence[Trouble]) -> str:
        """Return what is wrong with the rows that were calibrated and measured."""
        rows = [self._texts.calibration.ids, self._texts.evaluation.ids]
        decoded = own.tokenizer.decode(torch.cat([part.flatten() for part in rows]), skip_special_tokens=False)
        for each in troubles:
            if found := [word for word in each.never if word in decoded]:
                return f"the rows hold {found}"
        start = own.tokenizer.bos_token_id
        adds = start is not None and own.tokenizer("a")["input_ids"][:1] == [start]
        if adds and not _OWN_TEXTS & {each.name for each in troubles}:
            inside = sum(int((part[:, 1:] == start).sum()) for part in rows)
            if inside:
                return f"a start token stands inside of rows, {inside} times"
        return ""

    def _noting_quantize(self, quantize: Any) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            self._computing = True
            return quantize(*args, **named)

        return run

    def _noting_texts(self, run_base: Any) -> Any:
        def run(source: Any, found: Any, *args: Any, **named: Any) -> Any:
            self._texts = found
            return run_base(source, found, *args, **named)

        return run


def _compared(base: View, own: View, rows: torch.Tensor, quality: Any, *, same_tokens: bool) -> str:
    """Return how what readers get of a branch differs from what they get of the base model.

    Args:
        base: the base model, opened by transformers.
        own: the branch.
        rows: token ids.
        quality: what the build measured.
        same_tokens: whether the tokens must be those of transformers; not if they are those of tokenizer.json.
    """
    found = perplexity(base.logits, rows)
    distance = _distance(own.logits, base.logits)
    wrong = {
        f"other tokens: {own.tokens} for {base.tokens}": same_tokens and own.tokens != base.tokens,
        f"other chats: {own.chats} for {base.chats}": own.chats != base.chats,
        f"ends {sorted(own.ends)} for {sorted(base.ends)}": own.ends != base.ends,
        f"sampling {own.sampling} for {base.sampling}": own.sampling != base.sampling,
        "the branch does not generate": base.generates and not own.generates,
        f"the logits are {distance:.3f} away": not distance < _NEAR,
        f"perplexity of the base model {quality['base_perplexity']}, by transformers {found}": abs(
            found / quality["base_perplexity"] - 1
        )
        > _SAME,
    }
    return next((story[:600] for story, holds in wrong.items() if holds), "")


def _distance(own: torch.Tensor, base: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the base model's logits."""
    return float((own - base).norm() / base.norm()) if own.shape == base.shape else math.inf


def _names(case: Case) -> tuple[str, ...]:
    """Return names of which a refusal must have one: a file of the case, or the dataset."""
    named = (str(case.recipe[part].get("path", DATASET)) for part in ("calibration", "evaluation"))
    return (str(case.folder), "recipe.yaml", DATASET, *named)


def _file_problem(branch: Path) -> str:
    """Return what a branch's files may not hold."""
    for path in branch.rglob("*"):
        if path.suffix in (".json", ".md", ".jinja", ".txt") and PRIVATE in path.read_text(encoding="utf-8"):
            return f"{path.name} holds a path of a trainer"
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in json.loads((branch / name).read_bytes()):
            return f"{name} names code that is not there"
    return ""


def _tokens_of_the_file(branch: Path, own: View) -> str:
    """Return how tokenizer.json alone, which ExLlamaV2 and the servers read, differs from what transformers reads."""
    read = Tokenizer.from_file(str(branch / "tokenizer.json"))
    read.no_truncation()
    read.no_padding()
    for text in TEXTS:
        found, wanted = read.encode(text).ids, own.tokenizer(text)["input_ids"]
        if found != wanted:
            return f"tokenizer.json makes {found} of {text!r}, transformers {wanted}"
    return ""


def _described_here(folder: Path, where: str) -> Any:
    """Describe a model as the child does, in this process: importing transformers takes two seconds."""
    result = folder / "result.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        describe_in_child._answer(folder, result)
    return json.loads(result.read_text(encoding="utf-8"))


@contextmanager
def _shared_process() -> Iterator[None]:
    """Let all cases ask one process about tokenizers and templates; its forks have their limits as ever."""
    shared = ModelProcess()
    with shared, ExitStack() as stack:

        def enter(process: ModelProcess) -> ModelProcess:
            vars(process).update(vars(shared))
            return process

        stack.enter_context(patch.object(ModelProcess, "__enter__", enter))
        leave = patch.object(ModelProcess, "__exit__", lambda *_: None)
        with leave:
            yield
        stack.close()


def quiet_libraries() -> None:
    """Keep the libraries from reaching the network, and from printing."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
