"""The card's quality figures against transformers' whole forward and torch.nn.functional, and evaluation's memory."""

import dataclasses
import gc
import json
import math
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from packager.errors import MachineError, QuantizeError, SourceError
from packager.inputs.base_model import SourceModel
from packager.inputs.chat import Question
from packager.inputs.texts import TextSets
from packager.model.packing import dequantize_linear
from packager.pipeline.plan import make_plan
from packager.prove import evaluate, evaluation_memory
from packager.prove.evaluate import quality_of, run_base, run_checkpoint
from packager.prove.evaluation_memory import tokens_per_piece
from packager.receipt import QualityRecord
from packager.recipe.file import RecipeFile
from tests.known_models import known_architecture
from tests.samples import sampled
from tests.sources import open_folder
from tests.tiny_models import CONFIGS, save_model, token_rows

CPU = torch.device("cpu")
BITS, GROUP_SIZE = 4, 32
LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def whole_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def packed(values: Tensor) -> Tensor:
    """Pack 4-bit values [n, m] along the first axis, the lowest bits first: int32 [n / 8, m]."""
    words = sum(values[i::8].to(torch.int64) << (4 * i) for i in range(8))
    assert isinstance(words, Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def save_checkpoint(source: SourceModel, folder: Path) -> Path:
    """Save random 4-bit weights near the base model's, as a checkpoint in the v1 format (it stores zero - 1)."""
    folder.mkdir()
    dice = torch.Generator().manual_seed(5)
    tensors = {}
    for name in source.tensors:
        weight = source.read(name)
        linear = name.removesuffix(".weight")
        if not linear.endswith(LINEARS) or name.endswith(".bias"):
            tensors[name] = weight
            continue
        columns = weight.float().T.contiguous()  # [in_features, out_features]
        g_idx = torch.randperm(len(columns), generator=dice) // GROUP_SIZE
        scales = torch.stack([columns[g_idx == g].abs().amax(0) / 6 for g in range(int(g_idx.max()) + 1)]).half()
        zeros = torch.randint(7, 10, scales.shape, generator=dice)
        q = (columns / scales[g_idx].float() + zeros[g_idx]).round().clamp(0, 15)
        tensors[f"{linear}.qweight"] = packed(q)
        tensors[f"{linear}.qzeros"] = packed((zeros - 1).T).T.contiguous()
        tensors[f"{linear}.scales"] = scales
        tensors[f"{linear}.g_idx"] = g_idx.to(torch.int32)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source.folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": BITS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def unpacked(words: Tensor) -> Tensor:
    return torch.stack([(words >> (4 * i)) & 15 for i in range(8)], 1).reshape(-1, words.shape[1])


def dequantized_model(source: SourceModel, checkpoint: Path) -> Any:
    """The whole transformers model with a checkpoint's weights, unpacked here."""
    tensors = load_file(checkpoint / "model.safetensors")
    model = whole_model(source.folder)
    state = {name: tensor.float() for name, tensor in tensors.items() if name.endswith((".weight", ".bias"))}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        scales, g_idx = tensors[f"{name}.scales"].float(), tensors[f"{name}.g_idx"].long()
        zeros = unpacked(tensors[f"{name}.qzeros"].T.contiguous()).T + 1
        state[f"{name}.weight"] = ((unpacked(tensors[f"{name}.qweight"]) - zeros[g_idx]) * scales[g_idx]).T
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def answers(model: Any, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """Decode greedily with the whole model, one token at a time."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def questions_for(base: Any, quantized: Any) -> tuple[Question, ...]:
    """Return questions of unequal length: some answered by both, by one of them, or by none."""
    dice = torch.Generator().manual_seed(3)
    found = []
    for number in range(12):
        prompt = tuple(torch.randint(3, 128, (2 + number % 5,), generator=dice).tolist())
        answer = answers(base if number % 2 else quantized, prompt, 1 + number % 4)
        wrong = (answer[-1] + 1) % 128
        if number >= 6:
            answer = {6: answer, 7: (*answer[:-1], wrong), 8: (wrong, *answer[1:]), 9: answer}.get(number, answer)
        found.append(Question(prompt_ids=prompt, answer_ids=answer))
    return tuple(found)


def texts_of(rows: int, seq_len: int, questions: tuple[Question, ...] = ()) -> TextSets:
    return TextSets(
        calibration=token_rows(), evaluation=token_rows(rows, seq_len, seed=9), questions=questions, prompts=()
    )


def row_error(rows: Tensor) -> float:
    """The standard error of the mean of rows [rows, anything]; of one row there is none."""
    return float(rows.mean(1).std() / len(rows) ** 0.5) if len(rows) > 1 else math.nan


def share_error(figures: Tensor, share: float) -> float | None:
    """Half of what lies between the quantiles one error of the share below and above (Woodruff 1952)."""
    error = row_error((figures <= figures.flatten().quantile(share)).double())
    if math.isnan(error) or share - error < 0 or share + error > 1:
        return None
    low, high = (float(figures.flatten().quantile(share + step)) for step in (-error, error))
    return (high - low) / 2


@torch.no_grad()
def expected(base: Any, quantized: Any, texts: TextSets) -> dict[str, Any]:
    """Compute every figure with whole forwards, in float64 from the logits on."""
    ids = texts.evaluation.ids
    p, q = (model(ids).logits[:, :-1].flatten(0, 1).double() for model in (base, quantized))
    target = ids[:, 1:].flatten()
    shape = (len(ids), -1)
    loss, base_loss = (functional.cross_entropy(x, target, reduction="none").view(shape) for x in (q, p))
    kl = functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1).view(shape)
    same = (p.argmax(-1) == q.argmax(-1)).double().view(shape)
    errors = {
        "perplexity": float(loss.mean().exp()) * row_error(loss),
        "base_perplexity": float(base_loss.mean().exp()) * row_error(base_loss),
        "perplexity_change": float((loss.mean() - base_loss.mean()).exp()) * row_error(loss - base_loss),
        "kl_divergence": row_error(kl),
        "kl_median": share_error(kl, 0.5),
        "kl_p99": share_error(kl, 0.99),
        "top1_agreement": row_error(same),
    }
    rows = {"loss": loss, "base_loss": base_loss, "kl_divergence": kl, "top1_agreement": same}
    return {
        "errors": errors if len(ids) >= 8 else None,
        "rows": {name: figures.mean(1).tolist() for name, figures in rows.items()},
        "kl_median": float(kl.flatten().quantile(0.5)),
        "kl_p99": float(kl.flatten().quantile(0.99)),
        "num_tokens": target.numel(),
        "perplexity": math.exp(functional.cross_entropy(q, target)),
        "base_perplexity": math.exp(functional.cross_entropy(p, target)),
        "kl_divergence": float(
            functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="batchmean", log_target=True)
        ),
        "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        "questions": len(texts.questions),
        "answered": sum(answers(quantized, x.prompt_ids, len(x.answer_ids)) == x.answer_ids for x in texts.questions),
        "base_answered": sum(answers(base, x.prompt_ids, len(x.answer_ids)) == x.answer_ids for x in texts.questions),
    }


def flat(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures by their path; a row's figures are one tuple."""
    inner = {f"{key}.{name}": each for key, value in figures.items() if isinstance(value, dict)
             for name, each in value.items()}  # fmt: skip
    return {key: value for key, value in figures.items() if not isinstance(value, dict)} | inner


@dataclasses.dataclass(frozen=True)
class Pair:
    """A base model and a quantized checkpoint of it, as ours and as transformers' whole models."""

    source: SourceModel
    checkpoint: Path
    base: Any
    quantized: Any

    def measured(self, texts: TextSets) -> QualityRecord:
        base = run_base(self.source, texts, CPU)
        return quality_of(base, run_checkpoint(self.checkpoint, BITS, self.source, texts, CPU), texts)


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            source = open_folder(save_model(folder / "model", name), base_id="tester/tiny")
            checkpoint = save_checkpoint(source, folder / "checkpoint")
            made[name] = Pair(source, checkpoint, whole_model(source.folder), dequantized_model(source, checkpoint))
        return made[name]

    return get


SHAPES = [
    ("llama", 9, 32),
    ("llama", 6, 32),
    ("llama-tied", 5, 17),
    ("qwen2", 1, 2),
    ("mistral-sliding", 3, 40),
    ("qwen3", 4, 24),
]


@pytest.mark.parametrize(("name", "rows", "seq_len"), sampled(SHAPES, SHAPES[0]))
def test_every_figure_is_that_of_whole_forwards(
    pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, name: str, rows: int, seq_len: int
) -> None:
    pair = pair_of(name)
    texts = texts_of(rows, seq_len, questions_for(pair.base, pair.quantized))
    wanted = expected(pair.base, pair.quantized, texts)
    assert 0 < wanted["answered"] < len(texts.questions)
    assert 0 < wanted["base_answered"] < len(texts.questions)
    if rows * seq_len > 50:
        assert 0 < wanted["top1_agreement"] < 1
        assert wanted["perplexity"] != pytest.approx(wanted["base_perplexity"], rel=1e-4)
    rounding = 2e-7 if rows * seq_len > 50 else 1e-6  # of float32, which few tokens do not average out
    # Several batches of rows and of questions, and pieces that end inside a row and inside an answer.
    for batch_tokens, piece_tokens in ((4096, 1024), (70, 7)):
        monkeypatch.setattr(evaluate, "rows_per_batch", lambda length, _, n=batch_tokens: max(1, n // length))
        monkeypatch.setattr(evaluate, "tokens_per_piece", lambda _, n=piece_tokens: n)
        found = flat(pair.measured(texts).model_dump())
        assert found.keys() == flat(wanted).keys()
        for key, value in flat(wanted).items():
            assert found[key] == (value if value is None else pytest.approx(value, rel=2e-5, abs=rounding)), key


def test_without_questions_none_is_answered(pair_of: Callable[[str], Pair]) -> None:
    quality = pair_of("llama").measured(texts_of(2, 8))
    assert (quality.questions, quality.answered, quality.base_answered) == (0, 0, 0)


def test_a_model_compared_with_itself(pair_of: Callable[[str], Pair]) -> None:
    pair, texts = pair_of("llama"), texts_of(3, 16)
    result = run_base(pair.source, texts, CPU)
    quality = quality_of(result, result, texts)
    assert (quality.kl_divergence, quality.top1_agreement) == (0, 1)
    assert quality.perplexity == quality.base_perplexity


def test_each_tensor_is_read_once(pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    pair, read = pair_of("llama"), list[str]()
    original = SourceModel.read

    def counted(self: SourceModel, name: str) -> Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(SourceModel, "read", counted)
    texts = texts_of(2, 8, questions_for(pair.base, pair.quantized))
    run_base(pair.source, texts, CPU)
    assert sorted({name for name in read if read.count(name) > 1}) == []
    assert set(read) == set(pair.source.tensors)


def test_a_figure_that_is_no_number_is_refused(pair_of: Callable[[str], Pair]) -> None:
    pair, texts = pair_of("llama"), texts_of(2, 8)
    base = run_base(pair.source, texts, CPU)
    broken = dataclasses.replace(base, states=[state * math.nan for state in base.states])
    with pytest.raises(QuantizeError, match="the quantized model computes NaN or Inf on the evaluation text") as caught:
        quality_of(base, broken, texts)
    assert "perplexity nan, of the base model 1" in caught.value.why
    assert "other parameters for this variant" in caught.value.hint
    with pytest.raises(QuantizeError, match="the base model computes NaN or Inf") as caught:
        quality_of(broken, base, texts)
    assert "the base model overflows" in caught.value.hint


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_missing_tensor_is_an_error_of_the_model(pair_of: Callable[[str], Pair], name: str) -> None:
    pair = pair_of("llama")
    tensors = {key: stored for key, stored in pair.source.tensors.items() if key != name}
    source = dataclasses.replace(pair.source, tensors=tensors)
    with pytest.raises(SourceError, match="lack a tensor") as caught:
        run_base(source, texts_of(2, 8, questions_for(pair.base, pair.quantized)), CPU)
    assert caught.value.where == name


@pytest.mark.parametrize("part", ["qzeros", "g_idx"])
def test_a_missing_part_of_a_linear_is_an_error_of_the_checkpoint(
    pair_of: Callable[[str], Pair], tmp_path: Path, part: str
) -> None:
    pair = pair_of("llama")
    tensors = load_file(pair.checkpoint / "model.safetensors")
    del tensors[f"model.layers.2.mlp.up_proj.{part}"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((pair.checkpoint / "config.json").read_bytes())
    with pytest.raises(SourceError) as caught:
        run_checkpoint(tmp_path, BITS, pair.source, texts_of(2, 8), CPU)
    assert "model.layers.2.mlp.up_proj" in str(caught.value)


@pytest.mark.parametrize("step", ["run_blocks", "_compare"])
def test_a_gpu_without_memory_is_an_error_with_a_hint(
    pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(evaluate, step, fail)
    with pytest.raises(MachineError, match="the GPU's memory is exhausted") as caught:
        pair_of("llama").measured(texts_of(2, 8))
    assert caught.value.why == "CUDA out of memory"
    assert "--device cpu" in caught.value.hint


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operation made and that is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._known.pop(key)


@pytest.mark.slow
def test_the_peak_with_a_large_vocabulary_is_the_estimate(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 151_936, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float16).save_pretrained(tmp_path)
    source = open_folder(tmp_path, base_id="tester/wide")
    rows, seq_len = 4, 64  # 256 tokens: seven float32 tensors of them would take 1.1 GB
    texts = texts_of(rows, seq_len)
    base = run_base(source, texts, CPU)  # its head is read here
    gc.collect()
    with PeakBytes() as counter:
        quality_of(base, run_base(source, texts, CPU), texts)
    estimate = evaluation_memory.evaluation_memory(
        source.architecture, num_tokens=rows * seq_len, seq_len=seq_len, device_type="cpu"
    )
    assert 0.8 * estimate.device_bytes < counter.peak < 1.1 * estimate.device_bytes
    assert counter.peak < 600e6


def test_dequantizing_a_large_linear_takes_what_the_estimate_counts() -> None:
    """Beside the weights: the packed linear, of 8 bits at most, and a part of the weights in float32, twice."""
    inputs, outputs = 1024, 8192
    tensors = {
        "qweight": torch.zeros(inputs // 8, outputs, dtype=torch.int32),
        "qzeros": torch.zeros(inputs // 128, outputs // 8, dtype=torch.int32),
        "scales": torch.ones(inputs // 128, outputs).half(),
        "g_idx": (torch.arange(inputs) // 128).int(),
    }
    with PeakBytes() as counter:
        weight = dequantize_linear(tensors.__getitem__, BITS, torch.float16)
    assert weight.nbytes == 2 * inputs * outputs
    assert counter.peak - weight.nbytes < inputs * outputs + 9 * 2**20


def test_many_questions_and_one_long_one_stay_below_the_estimate(pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of("llama")
    short = [Question(prompt_ids=(5,) * 10, answer_ids=(6, 7))] * 1000
    texts = texts_of(4, 128, (*short, Question(prompt_ids=(5,) * 110, answer_ids=(6, 7))))
    gc.collect()
    with PeakBytes() as counter:
        quality_of(run_base(pair.source, texts, CPU), run_base(pair.source, texts, CPU), texts)
    estimate = evaluation_memory.evaluation_memory(
        pair.source.architecture, num_tokens=512, seq_len=128, device_type="cpu", questions=True
    )
    assert counter.peak < 1.1 * estimate.device_bytes


def test_questions_in_several_groups_have_the_same_result(
    pair_of: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of("llama")
    texts = texts_of(2, 8, questions_for(pair.base, pair.quantized))
    together = pair.measured(texts)
    monkeypatch.setattr(evaluate, "question_tokens", lambda *_: 12)
    monkeypatch.setattr(evaluate, "rows_per_batch", lambda *_: 2)
    assert 0 < together.answered < together.questions
    assert pair.measured(texts) == together


@pytest.mark.parametrize(("vocab_size", "tokens"), [(128, 1024), (16_384, 1024), (151_936, 110), (10**9, 1)])
def test_pieces_stay_below_a_number_of_bytes(vocab_size: int, tokens: int) -> None:
    assert tokens_per_piece(vocab_size) == tokens


def test_the_estimate_grows_with_the_rows_and_counts_the_host_beside_a_gpu() -> None:

    config = CONFIGS["llama"]().to_dict() | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"}
    architecture = known_architecture(json.loads(json.dumps(config, default=str)), "config.json")

    def estimate(num_tokens: int, device_type: str) -> evaluation_memory.EvaluationMemory:
        return evaluation_memory.evaluation_memory(
            architecture, num_tokens=num_tokens, seq_len=64, device_type=device_type
        )

    few, many = estimate(2**16, "cuda"), estimate(2**18, "cuda")
    states = 2 * (2**18 - 2**16) * architecture.hidden_size
    assert 0 < many.device_bytes - few.device_bytes <= states
    assert many.host_bytes - few.host_bytes == 2 * states
    assert estimate(2**16, "cpu").host_bytes == 0


def test_13b_is_measured_on_a_gpu_of_8_gb() -> None:
    """Each of the threads that read a block dequantizes a part of a linear beside the blocks."""
    plan = make_plan(RecipeFile.load(Path(__file__).parents[1] / "recipes" / "llama-2-13b-chat.yaml"))
    hidden, intermediate, tokens, batch = 5120, 13824, 131_072, 16_384
    block = 2 * (4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden)
    one = hidden * intermediate * 2  # gate_proj and up_proj see the same input: they count as one
    parts = 4 * (one + 9 * 2**24)
    (kind,) = plan.architecture.kinds
    states, running = 2 * tokens * hidden, batch * (kind.peak_bytes + 2048 * kind.peak_bytes_per_pair)
    head = 2 * 32_000 * hidden
    assert plan.evaluation.gpu.device_bytes == states + 3 * block + running + parts + head
    assert plan.evaluation.gpu.device_bytes < 8e9


def test_the_estimate_needs_no_torch() -> None:
    script = "import sys, packager.prove.evaluation_memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, check=False).returncode == 0
