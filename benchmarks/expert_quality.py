"""Compare ways to calibrate experts that see few tokens: held-out KL of a small model with experts, several seeds.

    python benchmarks/expert_quality.py FOLDER --json expert-quality.json

FOLDER gets a Qwen3-MoE (32 experts, two for each token) that is trained on the demo model's text first, some minutes on
a GPU, unless it is there. Each way then quantizes it from the same rows into each permutation, as `packager build`
does, and our evaluation measures each checkpoint. benchmarks/README.md describes the ways.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

import torch
from make_model import write_recipe
from processes import device_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from packager.model.describe import describe
from packager.model.experts import Experts
from packager.pipeline.build_options import Options
from packager.pipeline.build_state import BuildState
from packager.pipeline.evaluate_stage import evaluate
from packager.pipeline.quantize_stage import quantize_and_pack
from packager.quantize import experts as experts_module
from packager.quantize.gptq.expert_hessians import ExpertHessians, expert_hessians
from packager.quantize.gptq.routing import RoutedInputs, route
from packager.receipt import ExpertLinearRecord
from packager.recipe.file import RecipeFile
from packager.system.files import write_atomic
from packager.system.terminal import Terminal

DEMO = Path(__file__).parent.parent / "recipes" / "assets" / "demo-llama"
PERMUTATIONS = ((128, False), (32, True))
# hidden 256, so that 128 divides both in_features; 32 experts of 128 are 25 million parameters in six layers.
SHAPE: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128,
    "num_experts": 32, "num_experts_per_tok": 2, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "norm_topk_prob": True, "output_router_logits": True,
    "router_aux_loss_coef": 0.001, "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default="4,16,64", help="calibration rows of 256 tokens (default 4,16,64)")
    parser.add_argument("--seeds", default="0,1,2", help="calibration seeds (default 0,1,2)")
    parser.add_argument("--steps", type=int, default=1200, help="training steps (default 1200)")
    parser.add_argument("--documents", type=int, default=200_000, help="training documents (default 200000)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", type=Path, help="write all measurements here")
    given = parser.parse_args(arguments)
    if not (given.folder / "trained.json").exists():
        train(given.folder, given.steps, given.documents)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    found: list[Measured] = []
    for rows in (int(count) for count in given.rows.split(",")):
        for seed in seeds:
            for name, way in WAYS.items():
                found.extend(measure(given.folder, name, way, rows, seed, device_of(given.device)))
        if given.json is not None:
            trained = json.loads((given.folder / "trained.json").read_text())
            report = {"trained": trained, "measurements": [asdict(each) for each in found]}
            write_atomic(given.json.absolute(), json.dumps(report, indent=2).encode() + b"\n")
    Console(width=None if sys.stdout.isatty() else 160).print(table(found))
    return 0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One checkpoint.

    Attributes:
        way: how experts were calibrated.
        rows, seed: of the calibration.
        permutation: its name.
        kl: mean KL divergence to the base model on held-out text, nats per token.
        tokens: how many tokens the linears of experts saw: least, median, most.
        few: the share of them that saw fewer tokens than they have columns.
    """

    way: str
    rows: int
    seed: int
    permutation: str
    kl: float
    tokens: tuple[int, float, int]
    few: float


# The ways. Each replaces what the engine does to the Hessians of experts, or what it shows them.

Hessians = Callable[[Iterable[RoutedInputs], range, Tensor, Any], ExpertHessians]


def _own(batches: Iterable[RoutedInputs], experts: range, pooled: Tensor, ops: Any = None) -> ExpertHessians:
    """Each expert's own Hessian; that of a linear without inputs, the identity, for one that saw no token."""
    own = expert_hessians(batches, experts, torch.zeros_like(pooled), ops)
    for H, rho in zip(own.H, own.rhos, strict=True):
        H.copy_(torch.eye(len(H), device=H.device) if rho == 1 else H / (1 - rho))
    return own


def _rounded_below_columns(
    batches: Iterable[RoutedInputs], experts: range, pooled: Tensor, ops: Any = None
) -> ExpertHessians:
    """Rounding to nearest, which the identity means, for an expert with fewer tokens than columns."""
    own = _own(batches, experts, pooled, ops)
    for H, tokens in zip(own.H, own.tokens, strict=True):
        if tokens < len(H):
            H.copy_(torch.eye(len(H), device=H.device))
    return own


def _drawn(strength: float, batches: Iterable[RoutedInputs], experts: range, pooled: Tensor, ops: Any = None
           ) -> ExpertHessians:  # fmt: skip
    """The engine's way with rho = c n / (c n + tokens)."""
    own, columns = _own(batches, experts, pooled, ops), len(pooled)
    for H, tokens in zip(own.H, own.tokens, strict=True):
        H.lerp_(pooled, strength * columns / (strength * columns + tokens))
    return own


def _all_forward(
    experts: Experts, on_inputs: experts_module.OnInputs, hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Hand over the inputs that every expert would see if it got all tokens; compute what the router says."""
    module, count = experts.module, len(hidden)
    every = route(torch.arange(experts.num_experts, device=index.device).repeat(count, 1), experts.num_experts)
    on_inputs(experts.first, RoutedInputs(rows=hidden, routing=every, per_token=True))
    inner = experts_module._linear(experts, experts.first, hidden[every.tokens()], every)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    on_inputs("down_proj", RoutedInputs(rows=inner, routing=every, per_token=False))
    return _ROUTED(experts, lambda *_: None, hidden, index, weights)


_ROUTED = experts_module.experts_forward
WAYS: dict[str, tuple[Hessians | None, Any]] = {
    "drawn towards all (the engine's)": (None, None),
    "drawn a quarter as strongly": (partial(_drawn, 0.25), None),
    "drawn four times as strongly": (partial(_drawn, 4.0), None),
    "own tokens only": (_own, None),
    "rounded below as many tokens as columns": (_rounded_below_columns, None),
    "all tokens through all experts": (_own, _all_forward),
}


@contextmanager
def _used(way: tuple[Hessians | None, Any]) -> Iterator[None]:
    hessians, forward = way
    with ExitStack() as stack:
        if hessians is not None:
            stack.enter_context(mock.patch("packager.quantize.block.expert_hessians", hessians))
        if forward is not None:
            stack.enter_context(mock.patch("packager.quantize.experts.experts_forward", forward))
        yield


def measure(
    folder: Path, name: str, way: tuple[Hessians | None, Any], rows: int, seed: int, device: str
) -> list[Measured]:
    """Build the permutations from `rows` calibration rows, and measure them."""
    path = folder / "recipe.json"
    write_atomic(path, json.dumps(_recipe(rows, seed)).encode())
    dist = folder / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    options = Options(dist=dist, cache=dist / "cache", device=device, environ=dict(os.environ))  # type: ignore[arg-type]
    terminal = Terminal(quiet=True)
    build = BuildState(RecipeFile.load(path), options, terminal)
    with _used(way), build.workspace.locked():
        quantize_and_pack(build)
        evaluate(build)
    found = []
    for planned in build.plan.variants:
        receipt = build.receipts[planned.variant.branch]
        linears = [each for each in receipt.provenance.linears if isinstance(each, ExpertLinearRecord)]
        tokens = [each.tokens for each in linears]
        if receipt.provenance.quality is None:
            raise SystemExit(f"{planned.variant.branch} was not measured")
        measured = Measured(
            way=name, rows=rows, seed=seed, kl=receipt.provenance.quality.kl_divergence,
            permutation=f"{planned.variant.group_size}g{' desc_act' if planned.variant.desc_act else ''}",
            tokens=(min(tokens), median(tokens), max(tokens)), few=mean(each.rho > 0.5 for each in linears),
        )  # fmt: skip
        print(measured, file=sys.stderr, flush=True)
        found.append(measured)
    return found


def _recipe(rows: int, seed: int) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "repository": {"id": "benchmark/experts-GPTQ"},
        "base_model": {"id": "benchmark/experts", "path": "model"},
        "calibration": {"path": "text/calibration.jsonl", "num_samples": rows, "seq_len": 256, "seed": seed},
        "evaluation": {"path": "text/evaluation.jsonl", "num_tokens": 32768, "seq_len": 256},
        "defaults": {"bits": 4},
        "variants": [
            {"group_size": size, "desc_act": act, **({} if number else {"branch": "main"})}
            for number, (size, act) in enumerate(PERMUTATIONS)
        ],
        "card": {
            "title": "Experts", "creator": "a benchmark", "quantized_by": "benchmark", "license": {"id": "apache-2.0"},
            "prompt_template": {"name": "Llama-2-Chat", "template": "[INST] {prompt} [/INST]"},
        },
    }  # fmt: skip


def train(folder: Path, steps: int, documents: int) -> None:
    """Train the model on the text that the demo model was trained on, and write it with its texts and its lock."""
    sys.path.insert(0, str(DEMO))
    import train as demo  # type: ignore[import-not-found]
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "model").mkdir(parents=True, exist_ok=True)
    shutil.copytree(DEMO / "text", folder / "text", dirs_exist_ok=True)
    for path in (DEMO / "model").glob("*.json"):
        shutil.copyfile(path, folder / "model" / path.name)
    settings = demo.Settings(seed=1, documents=documents, steps=steps, batch_size=128, learning_rate=2e-3)
    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    stream = demo.encode(tokenizer, demo.training_texts(replace(settings, seed=demo.SEED)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    values = {"vocab_size": demo.VOCAB_SIZE, "max_position_embeddings": demo.SEQ_LEN, "bos_token_id": 1}
    config = AutoConfig.for_model(**SHAPE, **values, eos_token_id=2)
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.to(device).train()
    loss = _train(model, demo.Stream(ids=stream.ids.to(device), starts=stream.starts), settings, demo, device)
    model.half().save_pretrained(folder / "model")
    write_recipe(folder / "recipe.json", _recipe(4, 0), describe(folder / "model", None))
    facts = {"steps": steps, "documents": documents, "train_tokens": stream.ids.numel(), "train_loss": loss,
             "parameters": sum(each.numel() for each in model.parameters()), "shape": SHAPE}  # fmt: skip
    write_atomic(folder / "trained.json", json.dumps(facts, indent=2).encode() + b"\n")


def _train(model: Any, stream: Any, settings: Any, demo: Any, device: torch.device) -> float:
    """Train as the demo model is trained, with transformers' loss, which keeps the experts evenly used."""
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: demo.learning_rate_factor(step, settings))
    loss = torch.zeros(())
    for step in range(settings.steps):
        rows = stream.rows(settings.batch_size, demo.SEQ_LEN, generator)[:, :-1]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}", file=sys.stderr, flush=True)
    return float(loss.detach())


def table(found: Sequence[Measured]) -> Table:
    """Return mean KL by way, permutation and rows, and over the engine's way of the same seed: least and most."""
    first = next(iter(WAYS))
    columns = list(dict.fromkeys((each.rows, each.permutation) for each in found))
    rendered = Table("way", *(f"{rows} rows, {permutation}" for rows, permutation in columns))
    for way in WAYS:
        cells = []
        for column in columns:
            of = {each.seed: each.kl for each in found if (each.rows, each.permutation) == column and each.way == way}
            ours = {
                each.seed: each.kl for each in found if (each.rows, each.permutation) == column and each.way == first
            }
            ratios = [of[seed] / ours[seed] for seed in of]
            cells.append(f"{mean(of.values()):.5f} ({min(ratios):.2f} to {max(ratios):.2f})")
        rendered.add_row(way, *cells)
    return rendered


if __name__ == "__main__":
    sys.exit(main())
