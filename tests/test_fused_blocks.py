"""Fused modules against transformers' own: in Triton's interpreter on the CPU, natively under -m gpu.

A release of transformers that changes the mirrored source fails `test_fuses_every_norm_mlp_and_attention`.
"""

import copy
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from packager.model import fused_blocks
from packager.model.decoder import Decoder
from packager.model.fused_blocks import fuse
from tests.hypothesis_profiles import examples
from tests.tiny_models import CONFIGS, save_model

kernels = pytest.importorskip("packager.model.fused_kernels", reason="Triton is not made for this system")
FAMILIES = ("llama3-rope", "mistral", "qwen2", "qwen3")
# The interpreter computes with numpy, which warns where float32 or float16 overflows to infinity, as it should here.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.fixture(
    scope="module",
    params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda":
        assert torch.cuda.is_available(), "this test needs a CUDA GPU"
    elif not kernels.interpreted():
        pytest.skip("kernels take CPU tensors in the interpreter only, which -m gpu leaves out")
    return torch.device(request.param)


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    dtype: torch.dtype = request.param
    return dtype


@pytest.fixture(autouse=True)
def _seeded_and_without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def ulps(found: Tensor, expected: Tensor) -> Tensor:
    """Return how many values of their half-precision dtype lie between two tensors' elements."""

    def rank(x: Tensor) -> Tensor:
        bits = x.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    return (rank(found) - rank(expected)).abs()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def norm_of(width: int, kind: type = LlamaRMSNorm) -> Any:
    norm = kind(width, eps=1e-5)
    norm.weight.uniform_(-1.5, 1.5)
    return norm


def model_of(folder, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    return AutoModelForCausalLM.from_pretrained(save_model(folder / name, name), dtype=dtype).eval().to(device)


def token_ids(device: torch.device) -> Tensor:
    return torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize(
    ("kind", "width"),
    [(LlamaRMSNorm, 5120), (LlamaRMSNorm, 16384), (MistralRMSNorm, 4096), (Qwen2RMSNorm, 100), (Qwen3RMSNorm, 64)],
)
def test_norm_is_transformers_norm(device, dtype, kind, width):
    norm = norm_of(width, kind).to(device, dtype)
    x = torch.randn(3, 11, width, device=device).mul(5).to(dtype)
    x[0, 0] = 0
    found, expected = kernels.rms_norm(x, norm.weight, norm.variance_epsilon), norm(x)
    # The sum's order moves the value before the weight by 1 ulp at most, which the weight can make 2.
    difference = ulps(found, expected)
    assert difference.max() <= 2
    assert (difference > 0).double().mean() < 0.01
    plain = torch.ones_like(norm.weight)
    norm.weight.copy_(plain)
    assert ulps(kernels.rms_norm(x, plain, norm.variance_epsilon), norm(x)).max() <= 1


def test_norm_of_heads_inside_a_wider_projection(device, dtype):
    norm = norm_of(32).to(device, dtype)
    projected = torch.randn(2, 9, 3 * 5 * 32, device=device).to(dtype)
    heads = projected[..., 160:320].view(2, 9, 5, 32)
    assert not heads.is_contiguous()
    for x in (heads, heads.transpose(1, 2), heads[:, :, 1], heads[0, 0], heads[0, 0, 0]):
        assert ulps(kernels.rms_norm(x, norm.weight, 1e-5), norm(x)).max() <= 2


@settings(max_examples=examples(15))
@given(sizes=st.lists(st.integers(1, 5), max_size=3), width=st.integers(1, 300))
def test_norm_of_any_shape(device, sizes, width):
    norm = norm_of(width).to(device, torch.float16)
    x = torch.randn(*sizes, width, device=device).half()
    assert ulps(kernels.rms_norm(x, norm.weight, 1e-5), norm(x)).max() <= 2


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (4, 32), (5, 80), (17, 96), (3, 128)])
@pytest.mark.parametrize("tables", [1, 2])
def test_rotary_gives_the_bits_of_transformers_in_place(device, dtype, heads, head_dim, tables):
    """Queries and keys lie beside each other and the values, as one wide projection would leave them."""
    memory = torch.randn(2, 3, heads + 3, head_dim, device=device).to(dtype)
    before = memory.clone()
    cos, sin = (torch.randn(tables, 3, head_dim, device=device).to(dtype) for _ in range(2))
    q, k = memory[:, :, :heads].transpose(1, 2), memory[:, :, heads : heads + 2].transpose(1, 2)
    expected = apply_rotary_pos_emb(q.clone(), k.clone(), cos, sin)
    for x in (q, k):
        kernels.rotate_in_place(x, cos, sin)
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])
    assert torch.equal(memory[:, :, -1], before[:, :, -1])


def test_rotary_of_tables_shared_by_expansion(device, dtype):
    q = torch.randn(2, 4, 3, 32, device=device).to(dtype)
    cos, sin = (torch.randn(3, 64, device=device).to(dtype)[None, :, :32].expand(2, -1, -1) for _ in range(2))
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin)
    kernels.rotate_in_place(q, cos, sin)
    assert torch.equal(q, expected)


def test_silu_of_every_value(device, dtype):
    """Float16 and bfloat16 have few values: all are tried, but subnormals, which the interpreter reads wrongly."""
    gate = torch.arange(1 << 16).to(torch.int16).view(dtype).to(device)
    gate = gate[gate.isfinite() & (gate.abs() >= 4 * torch.finfo(dtype).tiny)].clone()
    expected = nn.functional.silu(gate)
    normal = expected.abs() >= torch.finfo(dtype).tiny
    kernels.silu_multiply_in_place(gate, torch.ones_like(gate))
    difference = ulps(gate, expected)[normal]
    assert difference.max() <= 1
    assert (difference > 0).double().mean() < 0.001


@pytest.mark.parametrize("size", [1, 96, 4096, 4097, 12345])
def test_silu_multiply_of_ragged_sizes_in_place(device, dtype, size):
    memory = torch.randn(size + 1, device=device).mul(4).to(dtype)
    up, last = torch.randn(size, device=device).to(dtype), memory[-1].clone()
    expected = SiLUActivation()(memory[:-1]) * up
    kernels.silu_multiply_in_place(memory[:-1], up)
    # A SiLU that is 1 ulp off can become a product that is 2 off.
    difference = ulps(memory[:-1], expected)
    assert difference.max() <= 2
    assert (difference > 0).double().mean() < 0.001
    assert torch.equal(memory[-1], last)


def expected_names(model: nn.Module) -> set[str]:
    ends = ("norm", "layernorm", "mlp", "self_attn")
    return {name for name, _ in model.named_modules() if name.endswith(ends)}


@pytest.mark.parametrize("name", CONFIGS)
def test_fuses_every_norm_mlp_and_attention(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    classes = {name: type(module) for name, module in model.named_modules()}
    result = fuse(model)
    names = result.fused
    assert set(names) == expected_names(model)
    assert len(names) == 13 + (6 if name == "qwen3" else 0)
    assert all(isinstance(module, classes[name]) for name, module in model.named_modules())
    assert result.candidates == names
    assert result.missed == ()
    assert str(result) == f"fused {len(names)} of {len(names)} norms, MLPs and attentions"
    again = fuse(model)
    assert (again.fused, again.candidates) == ((), ())


def recorded(model: Any, ids: Tensor) -> tuple[dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]], Tensor]:
    """Run a model; return what each norm, MLP and attention received and gave, and the last hidden states."""
    seen = {}

    def keep(name):
        def hook(_, args, kwargs, output):
            seen[name] = copy.deepcopy((args, kwargs, output))

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in expected_names(model)
    ]
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return seen, hidden


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fused_model_equals_the_model_of_transformers(tmp_path, monkeypatch, device, dtype, name):
    model, ids = model_of(tmp_path, name, dtype, device), token_ids(device)
    eager, expected = recorded(model, ids)
    fuse(model)
    calls: list[str] = []
    for kernel in ("rms_norm", "rotate_in_place", "silu_multiply_in_place"):
        original = getattr(kernels, kernel)
        monkeypatch.setattr(
            kernels, kernel, lambda *args, kernel=kernel, run=original: calls.append(kernel) or run(*args)
        )
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    norms = 13 if name == "qwen3" else 7
    assert {kernel: calls.count(kernel) for kernel in set(calls)} == {
        "rms_norm": norms, "rotate_in_place": 6, "silu_multiply_in_place": 3
    }  # fmt: skip
    eps = torch.finfo(dtype).eps
    assert relative_error(hidden, expected) < 2 * eps
    for module, (args, kwargs, output) in eager.items():
        found = model.get_submodule(module)(*args, **kwargs)
        if module.endswith("norm"):
            assert ulps(found, output).max() <= 2
        elif module.endswith("mlp"):
            assert relative_error(found, output) < eps / 4
        elif name == "qwen3":
            assert relative_error(found[0], output[0]) < eps / 2
        else:
            assert torch.equal(found[0], output[0])


def linear_groups(block: nn.Module, hidden: Tensor, context: dict[str, Any]) -> list[list[str]]:
    """Return the linears that see the same input, in the order in which the block reaches them."""
    seen: list[tuple[str, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0])))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    block(hidden, **context)
    for handle in handles:
        handle.remove()
    groups: list[list[str]] = []
    for index, (name, x) in enumerate(seen):
        if index and x is seen[index - 1][1]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def test_linears_are_called_as_before_and_up_is_freed_before_down(tmp_path, device):
    model, ids = model_of(tmp_path, "qwen3", torch.float16, device), token_ids(device)
    inputs: list[tuple[Tensor, dict[str, Any]]] = []
    block = model.model.layers[0]
    with block.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args[0], kwargs)), with_kwargs=True):
        model(input_ids=ids, use_cache=False)
    hidden, context = inputs[0]
    expected = linear_groups(block, hidden, context)
    fuse(block)
    alive: list[Any] = []
    block.mlp.up_proj.register_forward_hook(lambda _, __, output: alive.append(weakref.ref(output)))
    block.mlp.down_proj.register_forward_pre_hook(lambda _, __: alive.append(alive[0]()))
    assert linear_groups(block, hidden, context) == expected
    assert alive[1] is None


@pytest.mark.parametrize("why", ["float32", "gradients", "no interpreter"])
def test_own_code_runs_where_kernels_cannot(tmp_path, monkeypatch, why):
    model = model_of(tmp_path, "qwen3", torch.float32 if why == "float32" else torch.bfloat16, torch.device("cpu"))
    fused = copy.deepcopy(model)
    fuse(fused)
    monkeypatch.setattr(fused_blocks, "_interpreted", lambda: why != "no interpreter")
    for kernel in ("rms_norm", "rotate_in_place", "silu_multiply_in_place"):
        monkeypatch.setattr(kernels, kernel, None)
    ids = token_ids(torch.device("cpu"))
    with torch.set_grad_enabled(why == "gradients"):
        found, expected = (each(input_ids=ids, use_cache=False).logits for each in (copy.deepcopy(fused), model))
    assert torch.equal(found, expected)
    assert found.requires_grad == (why == "gradients")


class OffsetNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (1 + self.weight) * hidden_states.to(input_dtype)


class KeepingAttention(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, *_, **__):
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = key_states
        cos, sin = position_embeddings
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
        return query_states, value_states


def mlp_of(act_fn: Any) -> LlamaMLP:
    mlp = LlamaMLP(CONFIGS["llama"]())
    del mlp.act_fn
    mlp.act_fn = act_fn
    return mlp


def keeping_attention() -> LlamaAttention:
    config = CONFIGS["llama"]()
    assert isinstance(config, LlamaConfig)
    return KeepingAttention(config, 0)


def hooked_norm() -> Any:
    norm: Any = LlamaRMSNorm(64)
    norm.forward = norm.forward
    return norm


@pytest.mark.parametrize(
    ("make", "candidate"),
    [
        (lambda: OffsetNorm(64), True),
        (keeping_attention, True),
        (lambda: mlp_of(nn.GELU()), True),
        (lambda: mlp_of(nn.functional.silu), True),
        (hooked_norm, True),
        (lambda: nn.Linear(4, 4), False),
    ],
    ids=["another norm", "another attention", "another activation", "a function", "replaced forward", "linear"],
)
def test_leaves_unknown_modules_alone_and_reports_them(make, candidate):
    module = make()
    kind = type(module)
    result = fuse(module)
    assert result.fused == ()
    assert result.missed == (("",) if candidate else ())
    assert type(module) is kind


def test_recognises_both_modules_that_are_silu():
    assert fuse(mlp_of(nn.SiLU())).fused == fuse(mlp_of(SiLUActivation())).fused == ("",)


def test_does_nothing_without_triton(monkeypatch):
    monkeypatch.setattr(fused_blocks, "find_spec", lambda _: None)
    result = fuse(LlamaRMSNorm(64))
    assert (result.fused, result.candidates, result.missed) == ((), ("",), ())
    assert str(result) == "fused 0 of 1 norms, MLPs and attentions (Triton is not installed)"


def test_a_decoder_keeps_the_list_of_fused_modules(tmp_path, monkeypatch):
    """A release of transformers with other source text leaves every module unfused: the decoder lists none."""
    folder = save_model(tmp_path / "llama", "llama")

    def decoder() -> Decoder:
        return Decoder(folder, pytest.fail, device=torch.device("cpu"), dtype=torch.float32)

    assert len(decoder().fused.fused) == 13
    monkeypatch.setattr(fused_blocks, "_is", lambda *_: False)
    monkeypatch.setattr(fused_blocks, "_begins", lambda *_: False)
    other = decoder().fused
    assert other.fused == ()
    assert len(other.missed) == 13


@pytest.mark.gpu
def test_threads_can_run_fused_models_at_the_same_time(tmp_path):
    """One model per thread, the threads spread over the GPUs that there are."""
    assert torch.cuda.is_available(), "this test needs a CUDA GPU"
    devices = [torch.device("cuda", index % torch.cuda.device_count()) for index in range(4)]
    model = model_of(tmp_path, "llama", torch.float16, devices[0])
    fuse(model)
    models = [copy.deepcopy(model).to(device) for device in devices]

    def run(index: int) -> Tensor:
        with torch.no_grad():
            results: list[Tensor] = [
                models[index](token_ids(devices[index]), use_cache=False).logits.cpu() for _ in range(20)
            ]
        assert all(torch.equal(result, results[0]) for result in results)
        return results[0]

    with ThreadPoolExecutor(len(models)) as pool:
        found = list(pool.map(run, range(len(models))))
    assert all(torch.equal(each, found[0]) for each in found)
