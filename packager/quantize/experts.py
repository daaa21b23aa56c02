"""The forward of a layer's experts that can be suspended before each of their linears.

transformers holds all experts of a layer in two parameters of one module (`packager.model.experts`), whose linears are
no modules: hooks cannot suspend it. So its forward is replaced by `experts_forward`, which does the same and hands over
the inputs of each linear, with the routing, before it uses the linear's weights.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from packager.model.experts import Experts, experts_of
from packager.quantize.gptq.routing import RoutedInputs, Routing, route

OnInputs = Callable[[str, RoutedInputs], None]


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
    if getattr(module, "has_post_expert_norm", False):
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
def own_forward(
    block: nn.Module, on_inputs: OnInputs = lambda *_: None, names: Collection[str] | None = None
) -> Iterator[None]:
    """Let a block's experts compute by `experts_forward` while the context lasts.

    A block that is only run forward needs it too: its outputs have the bits of a block that was quantized in this run.

    Args:
        block: of a model.
        on_inputs: called with the full name of a parameter in the block, and its inputs.
        names: of the modules that compute so; None for all.
    """
    found = {name: experts for name, experts in experts_of(block).items() if names is None or name in names}
    try:
        for name, experts in found.items():
            experts.module.forward = partial(experts_forward, experts, _named(name, on_inputs))
        yield
    finally:
        for experts in found.values():
            experts.module.__dict__.pop("forward", None)


def _named(module_name: str, on_inputs: OnInputs) -> OnInputs:
    return lambda name, inputs: on_inputs(f"{module_name}.{name}" if module_name else name, inputs)
