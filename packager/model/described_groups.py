"""Which weights of a block can be quantized, in groups that see the same input, and why others are left alone."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from packager.errors import SourceError
from packager.model.experts import Experts, is_experts, recognised
from packager.model.lock import LockedExperts, LockedLinear
from packager.model.safetensors_file import TensorInfo
from packager.model.stored_names import StoredNames
from packager.model.trace import Trace

_ROUTES = "it routes tokens to experts"
_OTHER_3D = "its weights of three dimensions are no linear's, and it is not run as transformers runs experts"
_WIDTH = 32  # 32 values fill whole 32-bit words for every number of bits; kernels take no other widths


@dataclass(frozen=True, kw_only=True)
class DescribedGroup:
    """Linears that see the same input, as the lock writes them."""

    linears: tuple[LockedLinear, ...]
    experts: LockedExperts | None = None


@dataclass(frozen=True, kw_only=True)
class DescribedBlock:
    """The weights of one block.

    Attributes:
        groups: of linears that can be quantized.
        held: for each group, bytes of activations of the traced forward that are alive when the block reaches it.
        peak: most bytes of activations that are alive inside the block.
        held_pairs, peak_pairs: likewise of pairs of tokens, see `TracedBlock`.
        left: for each other module, why its weights stay as they are.
    """

    groups: tuple[DescribedGroup, ...]
    held: tuple[int, ...]
    held_pairs: tuple[int, ...]
    peak: int
    peak_pairs: int
    left: Mapping[str, str]


class _LeftError(Exception):
    """Internal signal: a module's weights stay as they are; its message is the reason."""


class GroupDescriber:
    """Describes the blocks of a traced model.

    Args:
        model: on the meta device.
        traced: its forward.
        names: of its stored tensors.
        stored: these tensors.
    """

    def __init__(self, model: nn.Module, traced: Trace, names: StoredNames, stored: Mapping[str, TensorInfo]) -> None:
        self._trace, self._names, self._stored = traced, names, stored
        self._blocks = cast(nn.ModuleList, model.get_submodule(traced.blocks_path))
        self._uses = Counter(id(parameter) for block in self._blocks for parameter in block.parameters())

    def describe(self, index: int) -> DescribedBlock:
        """Describe a block."""
        block, traced = self._blocks[index], self._trace.blocks[index]
        self._reached = Counter(name for group in traced.groups for name in group)
        left = {name: _why_unreached(name, traced.skipped) for name in (*traced.skipped, *traced.unreached)}
        left |= {
            name: _ROUTES
            for name, module in block.named_modules()
            if not isinstance(module, nn.Linear) and self._is_router(index, name, getattr(module, "weight", None))
        }
        left |= {
            name: _OTHER_3D
            for name, module in block.named_modules()
            if _has_3d_weights(module) and not any(f"{name}.".startswith(f"{parent}.") for parent in left)
        }
        found: list[tuple[DescribedGroup, int, int]] = []
        peak = traced.peak
        for group, alive, pairs in zip(traced.groups, traced.held, traced.held_pairs, strict=True):
            linears = []
            for name in group:
                module = block.get_submodule(name)
                try:
                    if is_experts(module):
                        experts, top_k = recognised(name, module), traced.top_k[name]
                        at_down, most = experts.bytes_per_token(top_k)
                        peak = max(peak, alive + self._trace.num_tokens * most)
                        first, down = self._experts(index, name, experts, top_k)
                        found += [(first, alive, pairs), (down, alive + self._trace.num_tokens * at_down, pairs)]
                    else:
                        linears.append(self._linear(index, name, cast(nn.Linear, module)))
                except _LeftError as reason:
                    left[name] = str(reason)
                except SourceError as error:
                    left[name] = error.brief
            if linears:
                found.append((DescribedGroup(linears=tuple(linears)), alive, pairs))
        return DescribedBlock(
            groups=tuple(group for group, _, _ in found), held=tuple(alive for _, alive, _ in found), peak=peak,
            held_pairs=tuple(pairs for _, _, pairs in found), peak_pairs=traced.peak_pairs, left=left,
        )  # fmt: skip

    def _linear(self, index: int, name: str, linear: nn.Linear) -> LockedLinear:
        conversion = self._names.conversions.get(f"{self._trace.blocks_path}.{index}.{name}.weight")
        stored_alone = (
            conversion is not None and conversion.converter is None and conversion.names[0].endswith(".weight")
        )
        self._check_use(name, linear)
        if self._is_router(index, name, linear.weight):
            raise _LeftError(_ROUTES)
        _check_shape(linear.in_features, linear.out_features)
        if conversion is None or not stored_alone:
            raise _LeftError("its weight is stored as a part of another tensor, or in several")
        return LockedLinear(
            module=name,
            stored=_of_any_block(conversion.names[0].removesuffix(".weight"), index),
            in_features=linear.in_features,
            out_features=linear.out_features,
            bias=linear.bias is not None,
        )

    def _check_use(self, name: str, module: nn.Module) -> None:
        if self._reached[name] > 1:
            raise _LeftError("the block uses it more than once")
        if any(self._uses[id(parameter)] > 1 for parameter in module.parameters()):
            raise _LeftError("several blocks share it")

    def _is_router(self, index: int, name: str, weight: object) -> bool:
        """Return whether a matrix, the only one of its branch, gives one value, or one for each expert beside it."""
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            return False
        parts = name.split(".")
        for depth in reversed(range(len(parts))):
            ancestor = self._blocks[index].get_submodule(".".join(parts[:depth]))
            counts = {cast(Tensor, module.down_proj).shape[0] for module in ancestor.modules() if is_experts(module)}
            if counts:
                branch = ancestor.get_submodule(parts[depth])
                # A table of one row beside it corrects the scores of experts: it is no other linear.
                others = [each for each in branch.parameters() if each is not weight and each.squeeze().ndim > 1]
                return not others and weight.shape[0] in {1, *counts}
        return False

    def _experts(self, index: int, name: str, experts: Experts, top_k: int) -> tuple[DescribedGroup, DescribedGroup]:
        """Return the groups of a module of experts: the linears that see tokens, and down."""
        self._check_use(name, experts.module)
        if not top_k:
            raise _LeftError("how it routes tokens is not understood")
        if experts.module.has_bias:
            raise _LeftError("its experts have biases, which no runtime was proven to read in a GPTQ checkpoint")
        first, down = (self._experts_group(index, name, experts, each, top_k) for each in experts.parameters)
        return first, down

    def _experts_group(self, index: int, name: str, experts: Experts, parameter: str, top_k: int) -> DescribedGroup:
        full_name = f"{self._trace.blocks_path}.{index}.{name}.{parameter}"
        if experts.interleaved or experts.module.is_transposed:
            raise _LeftError("its experts' weights lie in another order than runtimes read them")
        merged, one = self._names.merged(full_name), self._names.merged_in_file(full_name)
        if merged is None and one is not None and f".{index}." in one:
            before = one.partition(f".{index}.")[0]
            linear_names = self._names.linears_of_experts(full_name)
            out_features = experts.weight(parameter).shape[1] // len(linear_names)
            stems = {f"{before}.{{block}}.{name}.{{expert}}.{each}": out_features for each in linear_names}
        elif merged is not None:
            one, stems = None, dict(self._stems(index, merged))
        else:
            raise _LeftError("its experts are stored in several tensors, none of which is the weight of one linear")
        in_features = experts.weight(parameter).shape[2]
        for out_features in stems.values():
            _check_shape(in_features, out_features)
        return DescribedGroup(
            linears=tuple(
                LockedLinear(
                    module=f"{name}.{{expert}}.{stem.rpartition('.')[2]}",
                    stored=stem,
                    in_features=in_features,
                    out_features=out_features,
                    bias=False,
                )
                for stem, out_features in stems.items()
            ),
            experts=LockedExperts(
                parameter=f"{name}.{parameter}",
                stored=None if one is None else _of_any_block(one, index),
                count=experts.num_experts,
                top_k=top_k,
                per_token=parameter == experts.first,
            ),
        )

    def _stems(self, index: int, merged: Sequence[Sequence[str]]) -> Iterator[tuple[str, int]]:
        """Yield the stored name of each linear of a layer's experts in any block, and its out_features."""
        for position, stored in enumerate(merged[0]):
            template = _template([names[position] for names in merged])
            if template is None or not template.endswith(".weight"):
                raise _LeftError("the stored names of its experts are not numbered from 0")
            yield _of_any_block(template.removesuffix(".weight"), index), self._stored[stored].shape[0]


def _has_3d_weights(module: nn.Module) -> bool:
    """Return whether a module that is not one of experts has weights like theirs; those of convolutions are narrow."""
    return not is_experts(module) and any(
        weight.ndim == 3 and min(weight.shape[1:]) >= _WIDTH for weight in module.parameters(recurse=False)
    )


def _check_shape(in_features: int, out_features: int) -> None:
    if in_features % _WIDTH or out_features % _WIDTH:
        raise _LeftError(f"its shape, {in_features} to {out_features}, is no multiple of {_WIDTH}")


def _of_any_block(stored: str, index: int) -> str:
    return stored.replace(f".{index}.", ".{block}.", 1)


def _template(names: Sequence[str]) -> str | None:
    """Return the common name of tensors that are numbered from 0, with {expert} in place of the number; else None."""
    parts = names[0].split(".")
    for place in reversed(range(len(parts))):
        if parts[place] == "0":
            before, after = ".".join(parts[:place]), ".".join(parts[place + 1 :])
            if all(name == f"{before}.{number}.{after}" for number, name in enumerate(names)):
                return f"{before}.{{expert}}.{after}"
    return None


def _why_unreached(name: str, skipped: Sequence[str]) -> str:
    module = next((module for module in skipped if name == module or name.startswith(f"{module}.")), None)
    if module is None:
        return "the model's forward does not call it"
    return f"what {module} computes depends on the tokens' values"
