"""Which stored tensors make each parameter of a model, and how: names on disk differ from those in transformers.

transformers renames tensors, splits and concatenates them, and merges those of all experts into one, by its own
table (`conversion_mapping`). This module applies that table, one parameter at a time, in the way of transformers'
`convert_and_load_state_dict_in_model` (transformers.core_model_loading, 5.23), so that the whole model is never in
memory.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from packager.errors import SourceError
from packager.model.experts import is_experts
from packager.model.skeleton import is_transposed

if TYPE_CHECKING:
    from packager.model.safetensors_file import TensorInfo

ReadTensor = Callable[[str], Tensor]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How stored tensors become one parameter or several.

    Attributes:
        sources: names of stored tensors, by transformers' pattern, in transformers' order.
        target: the parameter by which transformers knows the conversion.
        converter: transformers' WeightConverter; None where the one stored tensor is the parameter.
    """

    sources: Mapping[str, tuple[str, ...]]
    target: str
    converter: Any

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all stored tensors."""
        return tuple(name for names in self.sources.values() for name in names)


class StoredNames:
    """The stored tensors of every parameter and stored buffer of a model.

    Args:
        model: on the meta device.
        names: of all stored tensors.
        dequantized: those of them that are read as [out_features, in_features] even where files hold them transposed.

    Attributes:
        conversions: by the name of the parameter; several parameters may share one.
        unused: names of stored tensors that the model does not have.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], dequantized: Collection[str] = ()) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

        self._model: Any = model
        self._dequantized = dequantized
        self._state = model.state_dict()
        mapping = get_model_conversion_mapping(cast(Any, model))
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._converters += _converters_of_experts(model, self._converters)
        by_pattern = {pattern: converter for converter in self._converters for pattern in converter.source_patterns}
        found: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        unused = []
        for name in sorted(names, key=dot_natural_key):
            target, pattern = self._renamed(name)
            if target not in self._state:
                unused.append(name)
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            found.setdefault(target, (converter, {}))[1].setdefault(pattern or name, []).append(name)
        self.unused = tuple(unused)
        self.conversions: dict[str, Conversion] = {}
        for target, (converter, sources) in found.items():
            conversion = Conversion(
                sources={pattern: tuple(names) for pattern, names in sources.items()}, target=target,
                converter=converter,
            )  # fmt: skip
            for parameter in self._targets(conversion):
                self.conversions[parameter] = conversion

    def _renamed(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._state)
        if target not in self._state and name in self._state:
            target, pattern = rename_source_key(name, [], [], prefix, self._state)
        return target, pattern

    def parameter_of(self, name: str) -> str:
        """Return the parameter that a stored tensor would make, whether the model has it or not."""
        return self._renamed(name)[0]

    def _targets(self, conversion: Conversion) -> Sequence[str]:
        """Return the names of the parameters that a conversion makes."""
        converter, target = conversion.converter, conversion.target
        if converter is None or len(converter.target_patterns) == 1:
            return (target,)
        first = converter.target_patterns[0]
        names = [target.replace(first, pattern) for pattern in converter.target_patterns]
        return [name for name in names if name in self._state]

    def missing(self) -> tuple[str, ...]:
        """Return the names of parameters and stored buffers that no stored tensor makes and that are not tied."""
        tied = set(getattr(self._model, "all_tied_weights_keys", {}) or {})
        return tuple(name for name in self._state if name not in self.conversions and name not in tied)

    def merged(self, parameter: str) -> tuple[tuple[str, ...], ...] | None:
        """Return the stored matrices that lie in a 3-D parameter, for each index of its first dimension.

        The conversion is tried on small matrices, so no operation of transformers' table is named here.

        Returns:
            Names of stored tensors [rows, columns], those of one index one below another; None where the parameter is
            not made so.
        """
        conversion = self.conversions.get(parameter)
        if conversion is None or conversion.converter is None:
            return None
        names = conversion.names
        small = {name: torch.arange(4.0).view(2, 2) + 4 * number for number, name in enumerate(names)}
        by_first_value = {4.0 * number: name for number, name in enumerate(names)}
        try:
            made = self._converted(conversion, parameter, small.__getitem__)
        except Exception:  # noqa: BLE001 - operations of any model, which may need the real shapes
            return None
        if made.ndim != 3 or made.shape[2] != 2 or made.shape[0] * made.shape[1] != 2 * len(names):
            return None
        found = tuple(tuple(by_first_value.get(row[0], "") for row in matrix[::2]) for matrix in made.tolist())
        if not all(name for matrix in found for name in matrix):
            return None
        again = torch.stack([torch.cat([small[name] for name in matrix]) for matrix in found])
        return found if torch.equal(again, made) else None

    def merged_in_file(self, parameter: str) -> str | None:
        """Return the name of the stored tensor that makes this parameter alone; None if several make it."""
        conversion = self.conversions.get(parameter)
        if conversion is None or len(conversion.names) != 1 or len(self._targets(conversion)) != 1:
            return None
        return conversion.names[0]

    def linears_of_experts(self, parameter: str) -> tuple[str, ...]:
        """Return the names of an expert's linears whose weights lie in a parameter of all experts, in order."""
        return _linears_in_table(self._converters, parameter) or _linears_of_experts(parameter)

    def read(self, parameter: str, read: ReadTensor) -> Tensor:
        """Read a parameter from disk, in the stored dtype, with the shape that it has in the model.

        Raises:
            SourceError: no stored tensor makes it, or not one of its shape; or `read` fails.
            KeyError: likewise of `read`.
        """
        conversion = self.conversions.get(parameter)
        if conversion is None:
            raise SourceError(
                "the weights lack a tensor that the model needs", where=parameter,
                hint="the installed transformers may build this architecture with other tensors",
            )  # fmt: skip
        tensor = self._converted(conversion, parameter, read)
        module = self._model.get_submodule(parameter.rpartition(".")[0])
        if is_transposed(module) and parameter.endswith(".weight") and conversion.names[0] not in self._dequantized:
            tensor = tensor.T.contiguous()
        if tensor.shape != self._state[parameter].shape:
            raise SourceError(
                "a tensor does not have the shape that the model needs", where=parameter,
                why=f"{', '.join(conversion.names[:3])} make one of {list(tensor.shape)}, "
                f"the model needs {list(self._state[parameter].shape)}",
                hint="compare the sizes in config.json with the weights: take both from one revision",
            )  # fmt: skip
        return tensor

    def is_converted(self, parameter: str) -> bool:
        """Return whether a parameter is made of stored tensors by a conversion of transformers."""
        conversion = self.conversions.get(parameter)
        return conversion is not None and conversion.converter is not None

    def _converted(self, conversion: Conversion, parameter: str, read: ReadTensor) -> Tensor:
        if conversion.converter is None:
            return read(conversion.names[0])
        converter = copy.deepcopy(conversion.converter)
        for pattern, names in conversion.sources.items():
            for name in names:
                converter.add_tensor(conversion.target, name, pattern, read(name))
        with torch.no_grad():
            made = converter.convert(conversion.target, model=self._model, config=self._model.config)
        tensor = made[parameter]
        return cast(Tensor, tensor[0] if isinstance(tensor, list) else tensor)


def _linears_of_experts(parameter: str) -> tuple[str, ...]:
    """Return the names that most models have for the linears of experts that lie in a parameter, in order."""
    name = parameter.rpartition(".")[2]
    return ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)


def _linears_in_table(converters: Iterable[Any], parameter: str) -> tuple[str, ...]:
    """Return the names that transformers' table has for them; none where it has no name for each expert."""
    for converter in converters:
        target = converter.target_patterns[0].replace("\\", "").lstrip(".")
        names = [pattern.partition(".*.")[2].replace("\\", "") for pattern in converter.source_patterns]
        if len(converter.target_patterns) == 1 and all(names) and f".{parameter}".endswith(f".{target}"):
            return tuple(name.removesuffix(".weight") for name in names)
    return ()


def _converters_of_experts(model: nn.Module, known: Sequence[Any]) -> list[Any]:
    """Return converters for experts that transformers' table knows as one tensor only.

    With them a branch, which has a name for each expert's linear, is read as one tensor for all experts.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if not is_experts(module) or module.is_transposed or not module.is_concatenated:
            continue
        # The module's name in its block; the table has it so, for the first parts differ from block to block.
        tail = ".".join(path.split(".")[-2:])
        for parameter in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
            target, names = f"{tail}.{parameter}", _linears_of_experts(parameter)
            if target in found or _linears_in_table(known, f"{path}.{parameter}"):
                continue
            found[target] = WeightConverter(
                source_patterns=[f"{tail}.*.{name}.weight" for name in names], target_patterns=target,
                operations=[MergeModulelist(dim=0), *([Concatenate(dim=1)] if len(names) > 1 else [])],
            )  # fmt: skip
    return list(found.values())


def saved_tensors(model: nn.Module) -> "dict[str, TensorInfo]":
    """Return the tensors that transformers would store for a model, in the way in which it saves one.

    Args:
        model: on the meta device.
    """
    from transformers.core_model_loading import revert_weight_conversion

    from packager.model.safetensors_file import TensorInfo

    state = {name: _as_stored(model, name, tensor) for name, tensor in model.state_dict().items()}
    for name in getattr(model, "all_tied_weights_keys", {}) or {}:
        state.pop(name, None)
    stored = revert_weight_conversion(cast(Any, model), state)
    return {
        name: TensorInfo(name=name, dtype=_SPELLINGS[tensor.dtype], shape=tuple(tensor.shape))
        for name, tensor in stored.items()
    }


_SPELLINGS = {
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.int32: "I32",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def _as_stored(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    transposed = name.endswith(".weight") and is_transposed(model.get_submodule(name.rpartition(".")[0]))
    return tensor.T if transposed else tensor
