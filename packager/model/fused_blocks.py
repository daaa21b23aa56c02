"""Fused norms, rotary embeddings and activations for transformers' decoder blocks on CUDA.

Beside its matrix products, a 13B block at 262,144 tokens spends 80 ms of 330 ms on an H100 in elementwise operations
that each read and write whole tensors. `fuse` replaces them, operation by operation, with one kernel each and the same
roundings; everything else of the block is transformers' own code.

The kernels mirror the source text below, which Llama, Mistral, Qwen2 and Qwen3 share word for word (transformers 5.0.0,
5.17.0 and 5.23.0). `fuse` compares it with the installed source: a module of any class is fused if its code is this
text, and left alone if a single operation differs. So a new release of transformers can make a build slower, by some
15 %, but not wrong; `FusedModules` shows it.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

_NORM = """
def forward(self, hidden_states):
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)
"""
_MLP = """
def forward(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj
"""
_SILU = """
def forward(self, input):
    return nn.functional.silu(input)
"""
_ROTATE_HALF = """
def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
"""
_ROTARY = """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
"""
# The first statements of an attention's forward. Queries and keys are new tensors and the last line rebinds their only
# names, so rotating them in place has no other effect. Qwen3 has the norms.
_ATTENTION = """
def forward(self):
    input_shape = hidden_states.shape[:-1]
    hidden_shape = (*input_shape, -1, self.head_dim)
    query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
    cos, sin = position_embeddings
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
"""
_NORMED_ATTENTION = _ATTENTION.replace(
    "self.q_proj(hidden_states).view(hidden_shape)", "self.q_norm(self.q_proj(hidden_states).view(hidden_shape))"
).replace("self.k_proj(hidden_states).view(hidden_shape)", "self.k_norm(self.k_proj(hidden_states).view(hidden_shape))")
_DTYPES = (torch.float16, torch.bfloat16)
_MAX_WIDTH = 16384  # of a row that a norm holds in one program's registers

_MARK = "_runs_fused_kernels"  # an attribute of the subclasses made here
_CANDIDATES = ("Norm", "MLP", "Attention")  # ends of the names that transformers gives such classes

_Forward = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class FusedModules:
    """The modules of a model that run fused kernels on CUDA, out of those that could.

    Attributes:
        fused: names of the modules that `fuse` changed.
        candidates: names of all norms, MLPs and attentions by the names of their classes; contains `fused`.
        triton_installed: False: no kernel can run, so nothing was fused.
    """

    fused: tuple[str, ...]
    candidates: tuple[str, ...]
    triton_installed: bool

    @property
    def missed(self) -> tuple[str, ...]:
        """The candidates that run transformers' own code although Triton is installed; empty where all is well."""
        return tuple(name for name in self.candidates if name not in self.fused) if self.triton_installed else ()

    def __str__(self) -> str:
        """Return one line for a log."""
        reason = "" if self.triton_installed else " (Triton is not installed)"
        return f"fused {len(self.fused)} of {len(self.candidates)} norms, MLPs and attentions{reason}"


def fuse(model: nn.Module) -> FusedModules:
    """Make the norms, MLPs and attentions in a model run fused kernels from now on.

    Each recognised module becomes an instance of a subclass of its class, with another forward. Its linears are called
    as before: in the same order, gate and up (and q, k and v) with the same tensor object. That forward chooses at
    every call: without gradients, on CUDA, in float16 or bfloat16 it launches kernels on the tensors' own device and
    current stream; otherwise it runs the class's own code. Nothing outside the model changes, so threads may fuse and
    run their models at the same time. A second call changes nothing.

    The outputs of gate_proj, q_proj and k_proj (with norms: of q_norm and k_norm) are overwritten after their use: a
    forward hook that keeps one must copy it.

    Args:
        model: a whole model, a block or a single module, its weights still on the meta device or not.

    Returns:
        The modules that were changed by this call, and those that could have been; one that an earlier call fused is
        in neither.
    """
    triton_installed = find_spec("triton") is not None
    changed, candidates = [], []
    for name, module in model.named_modules():
        if hasattr(type(module), _MARK):
            continue
        fused = _fused_class(module) if triton_installed else None
        if fused is not None:
            module.__class__ = fused
            changed.append(name)
        if fused is not None or type(module).__name__.endswith(_CANDIDATES):
            candidates.append(name)
    return FusedModules(fused=tuple(changed), candidates=tuple(candidates), triton_installed=triton_installed)


def _fused_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the subclass that runs kernels; None for a module that is not recognised or whose forward was replaced."""
    if "forward" in vars(module):
        return None
    return _fused_norm(module) or _fused_mlp(module) or _fused_attention(module)


def _fused_norm(module: nn.Module) -> type[nn.Module] | None:
    original: Any = type(module)
    return _norm_class(original) if _is(original.forward, _NORM) else None


def _fused_mlp(module: nn.Module) -> type[nn.Module] | None:
    original: Any = type(module)
    if not _is(original.forward, _MLP) or not _has_linears(module, "gate_proj", "up_proj"):
        return None
    activation: Any = type(module.act_fn)
    known = activation is nn.SiLU or _is(getattr(activation, "forward", None), _SILU)
    return _mlp_class(original) if known else None


def _fused_attention(module: nn.Module) -> type[nn.Module] | None:
    original: Any = type(module)
    forward: Any = original.forward
    if not (_begins(forward, _ATTENTION) or _begins(forward, _NORMED_ATTENTION)):
        return None
    rotary = forward.__globals__["apply_rotary_pos_emb"]
    known = _is(rotary, _ROTARY) and _is(rotary.__globals__["rotate_half"], _ROTATE_HALF)
    return _attention_class(original) if known and _has_linears(module, "q_proj", "k_proj") else None


def _has_linears(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in names)


@cache
def _norm_class(original: Any) -> type[nn.Module]:
    eager: _Forward = original.forward

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        weight, width = cast(Tensor, self.weight), hidden_states.shape[-1]
        fits = weight.shape == (width,) and width <= _MAX_WIDTH and hidden_states.stride(-1) == 1
        if not fits or not weight.is_contiguous() or not _runs_kernels(hidden_states, weight):
            return cast(Tensor, eager(self, hidden_states))
        from packager.model.fused_kernels import rms_norm

        return rms_norm(hidden_states, weight, cast(float, self.variance_epsilon))

    return _subclass(original, forward)


@cache
def _mlp_class(original: Any) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        # One expression: no name keeps the output of up_proj alive while down_proj runs or is suspended.
        return cast(Tensor, self.down_proj(_silu_multiply(self.act_fn, self.gate_proj(x), self.up_proj(x))))

    return _subclass(original, forward)


def _silu_multiply(act_fn: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, in gate's memory where a kernel runs."""
    dense = gate.shape == up.shape and gate.is_contiguous() and up.is_contiguous()
    if not dense or not _runs_kernels(gate, up):
        return cast(Tensor, act_fn(gate) * up)
    from packager.model.fused_kernels import silu_multiply_in_place

    silu_multiply_in_place(gate, up)
    return gate


@cache
def _attention_class(original: Any) -> type[nn.Module]:
    """Return a subclass whose forward is the original's code, in which the rotary function's name means the kernel."""
    forward: FunctionType = original.forward
    names = {**forward.__globals__, "apply_rotary_pos_emb": _rotary(forward.__globals__["apply_rotary_pos_emb"])}
    fused = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    fused.__kwdefaults__ = forward.__kwdefaults__
    return _subclass(original, fused)


def _rotary(eager: _Forward) -> _Forward:
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if not _runs_kernels(q, k, cos, sin) or not all(_fits(x, cos, sin) for x in (q, k)):
            return cast(tuple[Tensor, Tensor], eager(q, k, cos, sin))
        from packager.model.fused_kernels import rotate_in_place

        rotate_in_place(q, cos, sin)
        rotate_in_place(k, cos, sin)
        return q, k

    return apply


def _fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether x is [batch, heads, seq_len, head_dim], the tables [1 or batch, seq_len, head_dim], rows dense."""
    if x.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape or x.shape[-1] % 2:
        return False
    same = cos.shape[0] in {1, x.shape[0]} and cos.shape[1:] == x.shape[2:]
    return same and all(tensor.stride(-1) == 1 for tensor in (x, cos, sin))


def _runs_kernels(*tensors: Tensor) -> bool:
    """Return whether kernels can take these tensors: no gradients, CUDA, one half-precision dtype, not empty."""
    first = tensors[0]
    if torch.is_grad_enabled() or first.dtype not in _DTYPES:
        return False
    if any(x.dtype != first.dtype or x.device != first.device or not x.numel() for x in tensors):
        return False
    return first.is_cuda or (first.device.type == "cpu" and _interpreted())


@cache
def _interpreted() -> bool:
    from packager.model.fused_kernels import interpreted

    return interpreted()


def _subclass(original: Any, forward: _Forward) -> type[nn.Module]:
    members = {
        "forward": forward, "__module__": original.__module__, "__qualname__": original.__qualname__, _MARK: True
    }  # fmt: skip
    return cast(type[nn.Module], type(original.__name__, (original,), members))


@cache
def _is(function: object, text: str) -> bool:
    """Return whether a function has the arguments and statements of a source text."""
    found, mirrored = _definition(function), _parse(text)
    return found is not None and ast.dump(found.args) == ast.dump(mirrored.args) and _body(found) == _body(mirrored)


@cache
def _begins(function: object, text: str) -> bool:
    """Return whether a function begins with the statements of a source text."""
    found, mirrored = _definition(function), _body(_parse(text))
    return found is not None and _body(found)[: len(mirrored)] == mirrored


def _definition(function: object) -> ast.FunctionDef | None:
    """Return a plain function's parsed source; None for one that is wrapped, or has no source to read."""
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return None
    try:
        return _parse(inspect.getsource(function))
    except (OSError, SyntaxError):
        return None


def _parse(source: str) -> ast.FunctionDef:
    definition = ast.parse(textwrap.dedent(source)).body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise SyntaxError("not a function")
    arguments = definition.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    return definition


def _body(definition: ast.FunctionDef) -> list[str]:
    """Return the statements without the docstring, each as the text of its syntax tree."""
    statements = definition.body[1:] if ast.get_docstring(definition) is not None else definition.body
    return [ast.dump(statement) for statement in statements]
