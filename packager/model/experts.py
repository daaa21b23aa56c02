"""The experts of a layer as transformers 5 holds them: one module with a 3-D parameter for each kind of linear.

Source of the layout: `use_experts_implementation` of transformers.integrations.moe (5.23).
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from packager.errors import SourceError

# What `use_experts_implementation` writes into each module.
_LAYOUT = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


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

    def bytes_per_token(self, top_k: int) -> tuple[int, int]:
        """Return the memory that a token takes in the forward of `packager.quantize.experts`, in a dtype of two bytes.

        Args:
            top_k: experts that a token goes to.

        Returns:
            Bytes of what is alive when the inputs of down are known, and at most.
        """
        first, down = self.weight(self.first), self.weight("down_proj")
        hidden, outputs, inner = first.shape[2], first.shape[1], down.shape[2]
        # In elements of each choice: inputs and outputs of the first linears, those with gate and product, the result
        # weighted in float32 with its copy in the order of tokens.
        most = max(hidden + outputs, outputs + 3 * inner, 2 * hidden + inner, 4 * hidden)
        return 2 * top_k * inner, 2 * top_k * most


def is_experts(module: nn.Module) -> bool:
    """Return whether a module holds the weights of all experts of a layer, as transformers builds them."""
    return all(hasattr(module, attribute) for attribute in (*_LAYOUT, "down_proj"))


def experts_of(block: nn.Module) -> dict[str, Experts]:
    """Return a block's modules of experts by name.

    Raises:
        SourceError: a module is not built as transformers 5 builds experts.
    """
    return {name: recognised(name, module) for name, module in block.named_modules() if is_experts(module)}


def recognised(name: str, module: Any) -> Experts:
    """Return what is known of a module for which `is_experts` holds.

    Raises:
        SourceError: it is not built as transformers 5 builds experts; `why` gives the difference.
    """
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


def _unknown(name: str, module: nn.Module, why: str) -> SourceError:
    return SourceError(
        f"the experts {type(module).__name__} are not understood",
        where=name,
        why=why,
        hint="leave these experts in the base model's dtype",
    )
