"""Every architecture through the whole pipeline and into the real loaders, compared with the prediction of `plan`.

Run by `nox -s tests-release`, because the loaders' environments must exist. A tiny random model of each architecture is
built into three variants; then each loader opens all of them in one process, judged as `verify` judges in a build.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from packager.errors import PlanError
from packager.model.describe import describe
from packager.model.runtimes import LoaderName
from packager.pipeline.build_state import BuildState
from packager.pipeline.plan import BuildPlan, make_plan
from packager.prove.environments import RuntimeContext
from packager.prove.tolerances import TOLERANCE
from packager.prove.verify import VerifyJob, checkpoint_of, verify
from packager.receipt import LoaderRecord
from packager.recipe import Loaders
from packager.recipe.file import RecipeFile
from packager.recipe.lock_file import lock_path, lock_text
from packager.system.terminal import Terminal
from tests import tiny_recipe
from tests.locks import read_lock_of
from tests.tiny_recipe import write_inputs, write_recipe

pytestmark = pytest.mark.release

LOADERS: tuple[LoaderName, ...] = ("autogptq", "transformers", "onnxruntime")
SIGNED = "signed-scales"
VARIANTS = [
    {"branch": "main"},
    {"group_size": 16, "desc_act": True},
    {"branch": SIGNED, "group_size": 16, "scale_search": "signed"},
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of tests/tiny_models.py, its config.json spelled as one or the other transformers writes it.

    Attributes:
        model: one of CONFIGS.
        rope_theta: the rotary embedding's base, where it is not the model's own.
        old: config.json as transformers 4 wrote it, and as almost all published models have it: rope_theta and
            rope_scaling apart, torch_dtype; else rope_parameters and dtype.
        config: more keys of config.json.
        refusal: the reason in our verdict on AutoGPTQ, or "" where it can load.
        trap: the warning in our verdict; it does not concern these rows.
        onnxruntime_trap: the warning in our verdict on ONNX Runtime; it does not concern shorter rows.
        old_only: it concerns transformers 4.40; with the 4.46 that AutoGPTQ gets on Python 3.13, it may pass.
    """

    model: str
    rope_theta: float | None = None
    old: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    refusal: str = ""
    trap: str = ""
    onnxruntime_trap: str = ""
    old_only: bool = False

    def outcomes(self, loader: str) -> set[str]:
        """Return every status that agrees with the verdict."""
        if loader == "onnxruntime" and self.onnxruntime_trap:
            return {"failed"}
        if loader != "autogptq" or not (self.refusal or self.trap):
            return {"passed"}
        return {"failed", "passed"} if self.old_only and sys.version_info >= (3, 13) else {"failed"}


WINDOW = "past 16 tokens its sliding window is not the model's"
CASES: dict[str, Case] = {
    "llama": Case(model="llama"),
    "llama-old-config": Case(model="llama", rope_theta=1e6, old=True),
    "llama-tied": Case(model="llama-tied", refusal="a head that it never loads"),
    "llama-attention-bias": Case(model="llama-attention-bias"),
    "llama-bias": Case(model="llama-bias"),
    "llama3-rope": Case(model="llama3-rope", refusal="of type llama3", old_only=True),
    "llama3-rope-old-config": Case(model="llama3-rope", old=True, refusal="of type llama3", old_only=True),
    "mistral": Case(model="mistral"),
    "mistral-sliding": Case(
        model="mistral-sliding", trap=WINDOW, onnxruntime_trap="past 16 tokens it computes without the", old_only=True
    ),
    "mistral-rope-theta": Case(model="mistral", rope_theta=1e6),
    "mistral-head-dim": Case(model="mistral-head-dim", refusal="head_dim", old_only=True),
    "qwen2": Case(model="qwen2"),
    "qwen2-old-config": Case(model="qwen2", rope_theta=1e6, old=True),
    "qwen2-unused-window": Case(
        model="qwen2", config={"use_sliding_window": False, "sliding_window": 16}, trap=WINDOW, old_only=True
    ),
    "qwen3": Case(model="qwen3", refusal="is proven with llama, mistral, qwen2, "),
}


def spell(config: Mapping[str, Any], case: Case) -> dict[str, Any]:
    """Return what transformers 5 saved with the case's rope_theta, in the case's spelling."""
    config = {**config, **case.config}
    rope = dict(config["rope_parameters"])
    rope["rope_theta"] = case.rope_theta or rope["rope_theta"]
    if not case.old:
        return {**config, "rope_parameters": rope}
    spelled = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    theta = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else rope
    return {**spelled, "torch_dtype": config["dtype"], "rope_theta": theta, "rope_scaling": scaling}


@dataclass(frozen=True, kw_only=True)
class Proven:
    """The plan of every case, and the results of the loaders: records by case, branch, loader.

    `negative` is the share of negative scales in the branch that has some, by case.
    """

    plans: Mapping[str, BuildPlan]
    negative: Mapping[str, float]
    records: Mapping[tuple[str, str, str], LoaderRecord]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A recipe of each case; no loader runs in its build, for verify() takes all builds at once."""
    found = {}
    for name, case in CASES.items():
        folder = write_inputs(tmp_path_factory.mktemp(name), case.model)
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(spell(json.loads(path.read_text()), case)))
        found[name] = recipe = write_recipe(folder, {"variants": VARIANTS})
        # Locks of tests are made without transformers, which reads an old spelling in its own way.
        lock = read_lock_of(recipe).model_copy(update={"model": describe(folder / "model", None)})
        lock_path(recipe).write_text(lock_text(lock))
    return found


@pytest.fixture(scope="module")
def proven(
    recipes: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Proven:
    checkpoints, owners, negative = [], {}, {}
    for number, (name, recipe) in enumerate(recipes.items()):
        dist = recipe.parent / "dist"
        for receipt in tiny_recipe.build(recipe, dist).receipts:
            branch = receipt.provenance.branch
            # Two recipes' branches have the same name; here each needs its own.
            unique = f"{number}-{branch}"
            owners[unique] = (name, branch)
            provenance = receipt.provenance.model_copy(update={"branch": unique})
            checkpoints.append(checkpoint_of(provenance, tiny_recipe.workspace(dist).folder(branch)))
            if branch == SIGNED:
                negative[name] = share_of_negative_scales(tiny_recipe.workspace(dist).folder(branch))
    # All have the same tokenizer, so any build's texts will do.
    recipe_file = RecipeFile.load(recipes["llama"])
    run = BuildState(recipe_file, tiny_recipe.options(recipes["llama"].parent / "dist"), Terminal(quiet=True))
    job = VerifyJob(
        checkpoints=checkpoints,
        ids=run.texts.evaluation.ids,
        prompts=run.texts.prompts,
        loaders=Loaders(required=LOADERS, prompts=("old bird",), seq_len=32, max_new_tokens=12),
        device=torch.device("cpu"),
        context=RuntimeContext(
            cache=Path(pytestconfig.getoption("--cache-folder")).expanduser(),
            scratch=tmp_path_factory.mktemp("verify"),
            environ=os.environ,
            log=print,
        ),
    )
    records = verify(job, print)
    return Proven(
        plans={name: make_plan(RecipeFile.load(recipe)) for name, recipe in recipes.items()},
        negative=negative,
        records={(*owners[unique], record.loader): record for unique, found in records.items() for record in found},
    )


def share_of_negative_scales(folder: Path) -> float:
    tensors = load_file(next(folder.glob("*.safetensors")))
    scales = torch.cat([tensor.flatten() for name, tensor in tensors.items() if name.endswith(".scales")])
    return float((scales < 0).double().mean())


@pytest.mark.parametrize("name", CASES)
def test_the_loaders_were_given_negative_scales(proven: Proven, name: str) -> None:
    assert 0.4 < proven.negative[name] < 0.6


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", CASES)
def test_the_result_of_a_loader_is_the_predicted_one(proven: Proven, name: str, loader: str) -> None:
    """Measured: relative errors of 0.0008 and less where it passes, 0.1 and more where it computes other values."""
    case = CASES[name]
    for planned in proven.plans[name].variants:
        record = proven.records[name, planned.variant.branch, loader]
        (verdict,) = [each for each in planned.verdicts if each.loader == loader]
        assert verdict.can_load is not (loader == "autogptq" and bool(case.refusal)), verdict.reason
        if loader == "onnxruntime":
            assert case.onnxruntime_trap in verdict.reason
            assert bool(case.onnxruntime_trap) is ("past" in verdict.reason)
        if loader == "autogptq":
            assert case.refusal in verdict.reason
            assert case.trap in verdict.reason
            assert bool(case.trap) is ("sliding window" in verdict.reason)
        assert record.status in case.outcomes(loader), record.reason
        if record.status == "failed":
            assert record.reason
        else:
            assert record.relative_error is not None
            assert record.relative_error <= (1e-5 if loader == "onnxruntime" else TOLERANCE["float32"])
            assert record.dtype == "float32"
            assert record.tokens_generated == record.tokens_equal > 0


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refusal])
def test_a_recipe_that_requires_a_refusing_loader_is_refused(recipes: Mapping[str, Path], name: str) -> None:
    changes = {"variants": VARIANTS, "loaders.required": ["autogptq"]}
    recipe = write_recipe(recipes[name].parent, changes, name="required.yaml")
    with pytest.raises(PlanError, match=CASES[name].refusal):
        make_plan(RecipeFile.load(recipe))
