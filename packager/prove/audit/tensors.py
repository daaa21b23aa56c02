"""The names, dtypes and shapes of the tensors. Only headers are read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from packager.model.architecture import Architecture, LinearSpec
from packager.model.checkpoint import quantized_tensors
from packager.model.config_values import LARGEST_SIZE
from packager.model.safetensors_file import StoredTensor
from packager.prove.audit.config import Declared, bits_of
from packager.prove.audit.finding import Findings
from packager.prove.audit.model import KnownModel
from packager.prove.audit.weights import Weights

PARTS: Mapping[str, str] = {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"}
BIAS, BIAS_DTYPE = "bias", "F16"

_HEAD_WEIGHT = "lm_head.weight"
_OUTPUT_HEADS = ("lm_head", "embed_out")
_FLOATS = ("F16", "BF16", "F32", "F64")
_NUMBER = re.compile(r"\d{1,6}\Z", re.ASCII)
# A module inside a block of any architecture: everything up to the first number, then the name that blocks share.
_IN_BLOCK = re.compile(r".*?\.\d{1,6}\.(.+)\Z", re.DOTALL)

Parts = Mapping[str, StoredTensor]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The parameters that config.json and quantize_config.json declare, and what is known of the model."""

    declared: Declared
    model: KnownModel


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A quantized linear whose tensors have the right dtypes and shapes, so that their values can be read.

    Attributes:
        name: the module's name.
        parts: qweight, qzeros, scales, g_idx, and bias if there is one.
        in_features: columns of the weight.
        bits: bits per weight.
        group_size: columns that share a scale; -1 = all.
        has_bias: it has a bias.
        needs_bias: it may have one: the architecture has one here, or is not known.
    """

    name: str
    parts: Parts
    in_features: int
    bits: int
    group_size: int
    has_bias: bool
    needs_bias: bool


@dataclass(frozen=True, kw_only=True)
class _Modules:
    """The tensors of the weights set: by quantized module, and the rest."""

    quantized: Mapping[str, Parts]
    plain: Parts


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The bits and the group size by which the linears are packed."""

    bits: int
    group_size: int


def check_tensors(weights: Weights, expected: Expected, findings: Findings) -> tuple[Linear, ...]:
    """Report every tensor that is missing, too many, or of the wrong dtype or shape.

    Returns:
        The quantized linears whose values can be read.
    """
    if not expected.declared.is_gptq:
        return ()
    modules, architecture = _split(weights), expected.model.architecture
    specs = {spec.name: spec for spec in architecture.linears} if architecture else {}
    if not modules.quantized and weights.is_all_read:
        findings.add("no-quantized-linear", weights.files[0], "no tensor is part of a quantized linear")
    else:
        _check_unquantized(modules, specs, expected.declared, findings)
    if architecture and modules.quantized:
        _check_names(modules, architecture, specs, findings)
        _check_plain_shapes(modules.plain, architecture, findings)
        if weights.is_all_read:
            _check_missing(modules, architecture, specs, findings)
    _check_dtypes(modules.plain, expected, findings)
    layout = _layout(modules.quantized, expected.declared)
    linears = []
    for name, parts in modules.quantized.items():
        if name in _OUTPUT_HEADS:
            findings.add("lm-head-quantized", name, "the output head is quantized")
        sound = _check_parts(name, parts, findings, is_all_read=weights.is_all_read)
        if name in specs:
            _check_bias(specs[name], parts, findings, is_all_read=weights.is_all_read)
        own = layout
        if layout and expected.declared.has_mixed_bits and (bits := bits_of(weights, f"{name}.qweight")):
            own = replace(layout, bits=bits)
        if own and parts.keys() >= PARTS.keys():
            linear = _check_shapes(specs.get(name) or _derived_spec(name, parts, own), parts, own, findings)
            linears += [linear] if linear and sound else []
    return tuple(linears)


def quantized_modules(weights: Weights) -> frozenset[str]:
    """Return the names of the modules that have any tensor of a quantized linear."""
    pairs = (name.rpartition(".") for name in weights.tensors)
    return frozenset(module for module, _, part in pairs if part in PARTS)


def split_tensors(weights: Weights) -> Mapping[str, Parts]:
    """Return the tensors of each quantized module by their parts."""
    return _split(weights).quantized


def _split(weights: Weights) -> _Modules:
    quantized: dict[str, dict[str, StoredTensor]] = {name: {} for name in sorted(quantized_modules(weights))}
    plain = {}
    for name in sorted(weights.tensors):
        module, _, part = name.rpartition(".")
        if module in quantized and part in (*PARTS, BIAS):
            quantized[module][part] = weights.tensors[name]
        else:
            plain[name] = weights.tensors[name]
    return _Modules(quantized=quantized, plain=plain)


def _block_number(name: str, architecture: Architecture) -> int | None:
    """Return the number of the block that a stored name belongs to."""
    if not name.startswith(f"{architecture.blocks_prefix}."):
        return None
    number = name.removeprefix(f"{architecture.blocks_prefix}.").partition(".")[0]
    return int(number) if _NUMBER.match(number) else None


def _check_unquantized(
    modules: _Modules, specs: Mapping[str, LinearSpec], declared: Declared, findings: Findings
) -> None:
    """Report linears left in floating point where the architecture or the other blocks have quantized ones."""
    places = {match[1] for name in modules.quantized if (match := _IN_BLOCK.match(name))}
    for name in modules.plain:
        module, _, part = name.rpartition(".")
        match = _IN_BLOCK.match(module)
        if (
            part == "weight"
            and module not in modules.quantized
            and not declared.leaves(module)
            and (module in specs or (not specs and match and match[1] in places))
        ):
            findings.add("linear-unquantized", module, "this linear is not quantized, others are")


def _check_names(
    modules: _Modules,
    architecture: Architecture,
    specs: Mapping[str, LinearSpec],
    findings: Findings,
) -> None:
    """Report tensors that the architecture does not have, and blocks beyond its last."""
    known = {_HEAD_WEIGHT, *(tensor.name for tensor in architecture.tensors)}
    strays = [name for name in modules.plain if name not in known]
    strays += [name for name in modules.quantized if name not in specs and name not in _OUTPUT_HEADS]
    beyond = {
        number for name in strays if (number := _block_number(name, architecture) or 0) >= architecture.num_blocks
    }
    if beyond:
        message = f"config.json declares {architecture.num_blocks} blocks, {len(beyond)} more are here"
        findings.add("block-unexpected", f"{architecture.blocks_prefix}.{min(beyond)}", message)
    for name in strays:
        if _block_number(name, architecture) not in beyond:
            findings.add("tensor-unexpected", name, "the architecture has nothing of this name")


def _check_plain_shapes(plain: Parts, architecture: Architecture, findings: Findings) -> None:
    shapes = {tensor.name: tensor.shape for tensor in architecture.tensors}
    for name, tensor in plain.items():
        shape, right = tensor.info.shape, shapes.get(name)
        if right is not None and shape != right:
            findings.add("tensor-shape", name, f"its shape is {list(shape)}, config.json gives {list(right)}")


def _check_missing(
    modules: _Modules,
    architecture: Architecture,
    specs: Mapping[str, LinearSpec],
    findings: Findings,
) -> None:
    """Report what the architecture has and the weights lack; all missing blocks are one finding."""
    present = {_block_number(name, architecture) for name in (*modules.quantized, *modules.plain)}
    absent = [block for block in range(architecture.num_blocks) if block not in present]
    if absent:
        message = f"{len(absent)} of {architecture.num_blocks} blocks are missing"
        findings.add("block-missing", f"{architecture.blocks_prefix}.{absent[0]}", message)
    for name in (tensor.name for tensor in architecture.tensors):
        module, _, part = name.rpartition(".")
        if name in modules.plain or module in modules.quantized or _block_number(name, architecture) in absent:
            continue
        if name == _HEAD_WEIGHT:
            findings.add("lm-head-missing", name, "there is no output head, and tie_word_embeddings is not true")
        elif module not in specs:
            findings.add("tensor-missing", name, "the architecture has this tensor, the weights do not")
        elif part == "weight":
            findings.add("linear-missing", module, "the architecture has this linear, the weights do not")


def _check_dtypes(plain: Parts, expected: Expected, findings: Findings) -> None:
    """Report tensors of another dtype than the base model's; many models keep norms, routers and scales in float32."""
    for name, tensor in plain.items():
        found, known = tensor.info.dtype, expected.model.dtypes.get(name)
        if known is not None:
            if found != known:
                findings.add("tensor-dtype", name, f"it is {found}, the base model's is {known}")
        elif (declared := expected.model.dtype) and found in _FLOATS and found not in (declared, "F32"):
            findings.add("dtype-disagrees", name, f"it is {found}, config.json declares {declared}")


def _layout(quantized: Mapping[str, Parts], declared: Declared) -> _Layout | None:
    """Return how the linears are packed: as declared, else as the first readable linear shows, else None."""
    bits, group_size = declared.bits, declared.group_size
    for parts in quantized.values():
        if bits is not None and group_size is not None:
            return _Layout(bits=bits, group_size=group_size)
        if not _has_readable_shapes(parts):
            continue
        (in_features,), words = parts["g_idx"].info.shape, parts["qweight"].info.shape[0]
        groups = parts["scales"].info.shape[0]
        if bits is None and words * 32 % in_features == 0 and words * 32 // in_features in (2, 3, 4, 8):
            bits = words * 32 // in_features
        if group_size is None and in_features % groups == 0:
            group_size = -1 if groups == 1 else in_features // groups
    return None if bits is None or group_size is None else _Layout(bits=bits, group_size=group_size)


def _has_readable_shapes(parts: Parts) -> bool:
    ranks = {"qweight": 2, "scales": 2, "g_idx": 1}
    shapes = [(parts[part].info.shape if part in parts else (), rank) for part, rank in ranks.items()]
    return all(len(shape) == rank and 0 not in shape for shape, rank in shapes)


def _check_parts(name: str, parts: Parts, findings: Findings, *, is_all_read: bool) -> bool:
    """Check which tensors a linear has and their dtypes; return whether both are right."""
    missing = [part for part in PARTS if part not in parts]
    if missing and is_all_read:
        findings.add("linear-incomplete", name, f"it lacks {', '.join(missing)}")
    dtypes = {part: tensor.info.dtype for part, tensor in parts.items()}
    wrong = [f"{part} is {dtype}" for part, dtype in dtypes.items() if dtype != PARTS.get(part, BIAS_DTYPE)]
    if wrong:
        findings.add("linear-dtype", name, ", ".join(wrong))
    return not missing and not wrong


def _check_bias(spec: LinearSpec, parts: Parts, findings: Findings, *, is_all_read: bool) -> None:
    if BIAS in parts and not spec.bias:
        findings.add("bias-needless", spec.name, "it has a bias, the architecture has none here")
    elif BIAS not in parts and spec.bias and is_all_read:
        findings.add("bias-missing", spec.name, "the architecture has a bias here, the weights have none")


def _derived_spec(name: str, parts: Parts, layout: _Layout) -> LinearSpec:
    """Return the shape of a linear that no architecture describes, from its qweight; 0 features if that cannot be."""
    shape = parts["qweight"].info.shape
    in_features, out_features = (shape[0] * 32 // layout.bits, shape[1]) if len(shape) == 2 else (0, 0)
    if max(in_features, out_features) > LARGEST_SIZE:
        in_features = out_features = 0
    return LinearSpec(
        name=name, block=0, module=name, in_features=in_features, out_features=out_features, bias=BIAS in parts
    )  # fmt: skip


def _check_shapes(spec: LinearSpec, parts: Parts, layout: _Layout, findings: Findings) -> Linear | None:
    """Check the shapes of a linear that has all its tensors; return it when they fit together."""
    bits, group_size = layout.bits, layout.group_size
    sizes = f"in {spec.in_features}, out {spec.out_features}, {bits} bits and group_size {group_size}"
    if not spec.in_features or not spec.out_features or spec.in_features * bits % 32 or spec.out_features * bits % 32:
        findings.add("linear-shape", spec.name, f"{sizes} cannot be packed into 32-bit words")
        return None
    right = {
        tensor.name.rpartition(".")[2]: tensor.shape
        for tensor in quantized_tensors(spec, bits=bits, group_size=group_size)
    }
    found = {part: parts[part].info.shape for part in right if part in parts}
    wrong = [f"{part} is {list(found[part])}, not {list(right[part])}" for part in found if found[part] != right[part]]
    if wrong:
        findings.add("linear-shape", spec.name, f"{sizes}: {'; '.join(wrong)}")
        return None
    if group_size != -1 and (ragged := spec.in_features % group_size):
        findings.add("group-ragged", spec.name, f"the last group has {ragged} of {group_size} columns")
    return Linear(
        name=spec.name,
        parts=parts,
        in_features=spec.in_features,
        bits=bits,
        group_size=group_size,
        has_bias=BIAS in parts,
        needs_bias=spec.bias,
    )
