"""The experts of a layer as transformers 5 holds them: one module with a 3-D parameter for each kind of linear.

Such a module cannot be suspended by hooks: its linears are no modules. So its forward is replaced by `experts_forward`,
which does the same and hands over the inputs of each linear, with the routing, before it uses the linear's weights.
Source of the layout: `use_experts_implementation` of transformers.integrations.moe (5.23).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from packager.errors import QuantizeError
from packager.quantize.gptq.routing import RoutedInputs, Routing, route

# What `use_experts_implementation` writes into each module.
_LAYOUT = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")

OnInputs = Callable[[str, RoutedInputs], None]


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A recognised module of experts.

    Attributes:
        module: holds the weights, the activation and biases.
        first: the parameter of the linears that see tokens, "gate_up_proj" or "up_proj".
        num_experts: experts of the layer.
        interleaved: rows of gate and up alternate; else all of gate come first.
    """

    module: Any
    first: str
    num_experts: int
    interleaved: bool

    @property
    def parameters(self) -> tuple[str, str]:
        """The names of the parameters to quantize, in the order in which they are used."""
        return self.first, "down_proj"

    def weight(self, name: str) -> Tensor:
        """Return the weights of all experts, [experts, out_features, in_features]; a view, whatever the layout."""
        weight: Tensor = getattr(self.module, name).detach()
        return weight.mT if self.module.is_transposed else weight


def experts_of(block: nn.Module) -> dict[str, Experts]:
    """Return a block's modules of experts by name.

    Raises:
        QuantizeError: a module holds 3-D parameters, or calls itself experts, and is not built as transformers 5
            builds them.
    """
    found = {}
    for name, module in block.named_modules():
        own = [parameter for _, parameter in module.named_parameters(recurse=False)]
        if all(hasattr(module, attribute) for attribute in _LAYOUT):
            found[name] = _recognised(name, module)
        elif any(parameter.ndim == 3 for parameter in own) and type(module).__name__.endswith("Experts"):
            raise _unknown(name, module, "it does not have the attributes of use_experts_implementation")
    return found


def _recognised(name: str, module: Any) -> Experts:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    weights: list[Any] = [getattr(module, each, None) for each in (first, "down_proj")]
    if not all(isinstance(weight, Tensor) and weight.ndim == 3 for weight in weights):
        raise _unknown(name, module, f"{first} and down_proj are not both 3-D parameters")
    up, down = (weight.mT if module.is_transposed else weight for weight in weights)
    inner = up.shape[1] // 2 if module.has_gate else up.shape[1]
    if up.shape[0] != down.shape[0] or down.shape[2] != inner or (module.has_gate and up.shape[1] % 2):
        raise _unknown(name, module, f"{first} {list(up.shape)} and down_proj {list(down.shape)} do not fit together")
    if module.has_bias and not all(hasattr(module, f"{each}_bias") for each in (first, "down_proj")):
        raise _unknown(name, module, "it has biases, but not both of them")
    if not callable(getattr(module, "_apply_gate" if module.has_gate else "act_fn", None)):
        raise _unknown(name, module, "its activation was not found")
    biases = {f"{each}_bias" for each in (first, "down_proj")} if module.has_bias else set()
    other = {each for each, _ in module.named_parameters(recurse=False)} - {first, "down_proj"} - biases
    if other:
        raise _unknown(name, module, f"it has parameters that its layout does not name: {', '.join(sorted(other))}")
    return Experts(module=module, first=first, num_experts=up.shape[0], interleaved=not module.is_concatenated)


def _unknown(name: str, module: nn.Module, why: str) -> QuantizeError:
    return QuantizeError(
        f"the experts {type(module).__name__} are not understood",
        where=name,
        why=why,
        hint="leave these experts in the base model's dtype",
    )


@torch.no_grad()
def experts_forward(
    experts: Experts, on_inputs: OnInputs, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute what the module's own forward computes, and hand over each linear's inputs before it is used.

    The outputs of a token's experts are added in the order of its choices, in float32.

    Args:
        experts: the module.
        on_inputs: called with a parameter's name and its inputs, twice: the weights may change during the call.
        hidden_states: [num_tokens, hidden].
        top_k_index: integers [num_tokens, top_k].
        top_k_weights: [num_tokens, top_k].
    """
    module = experts.module
    routing = route(top_k_index, experts.num_experts)
    on_inputs(experts.first, RoutedInputs(rows=hidden_states, routing=routing, per_token=True))
    inner = _linear(experts, experts.first, hidden_states[routing.tokens()], routing)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    on_inputs("down_proj", RoutedInputs(rows=inner, routing=routing, per_token=False))
    out = _linear(experts, "down_proj", inner, routing)
    del inner
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    out = out * top_k_weights.reshape(-1)[routing.pairs][:, None]
    by_choice = out.new_zeros(routing.num_tokens * routing.top_k, out.shape[1]).index_copy_(0, routing.pairs, out)
    summed = by_choice.view(routing.num_tokens, routing.top_k, -1).sum(dim=1, dtype=torch.float32)
    return summed.to(hidden_states.dtype)


def _linear(experts: Experts, name: str, rows: Tensor, routing: Routing) -> Tensor:
    """Apply each expert's linear to its rows, which are in the order of pairs."""
    weight, bias = experts.weight(name), getattr(experts.module, f"{name}_bias", None)
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for expert, (begin, end) in enumerate(zip(routing.ends, routing.ends[1:], strict=False)):
        if begin < end:
            torch.mm(rows[begin:end], weight[expert].T, out=out[begin:end])
            if bias is not None:
                out[begin:end] += bias[expert]
    return out


@contextmanager
def own_forward(block: nn.Module, on_inputs: OnInputs = lambda *_: None) -> Iterator[None]:
    """Let a block's experts compute by `experts_forward` while the context lasts.

    A block that is only run forward needs it too: its outputs have the bits of a block that was quantized in this run.

    Args:
        block: of a model.
        on_inputs: called with the full name of a parameter in the block, and its inputs.
    """
    found = experts_of(block)
    try:
        for name, experts in found.items():
            experts.module.forward = partial(experts_forward, experts, _named(name, on_inputs))
        yield
    finally:
        for experts in found.values():
            experts.module.__dict__.pop("forward", None)


def _named(module_name: str, on_inputs: OnInputs) -> OnInputs:
    return lambda name, inputs: on_inputs(f"{module_name}.{name}" if module_name else name, inputs)
