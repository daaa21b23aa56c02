"""Random GPTQ checkpoints of the decoders of tests/tiny_decoders.py: names, shapes and config as a build packs them."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from packager.model.architecture import Architecture, LinearSpec, architecture_of
from packager.model.branch_config import normalized
from packager.model.branch_rules import ModelFacts
from packager.model.checkpoint import checkpoint_tensors
from packager.model.describe import describe
from packager.model.packing import pack, pack_zeros
from packager.model.safetensors_file import StoredTensor, read_tensor, stored_tensors
from packager.pipeline.branch_files import BranchNames, portable_config, quantization_config
from packager.receipt import CONFIG
from packager.variant import Variant, num_groups
from tests.tiny_decoders import VOCABULARY, tiny_decoder

VARIANT = Variant(
    branch="main", bits=4, group_size=32, act_order="full", sym=False, damp_percent=0.1, damp_percent_limit=0.5,
    true_sequential=True, scale_search=False, refine=False, effort="standard", engine="native",
)  # fmt: skip


def packed_decoder(
    name: str, folder: Path, *, skip: Sequence[str] = (), variant: Variant = VARIANT, spread: int = 1
) -> Architecture:
    """Write a checkpoint of one of NAMES to `folder`; its quantized weights are random, the rest is the tiny model's.

    The zeros differ by at most `spread` from the middle of the grid.

    Returns:
        The architecture, without the linears that fit a pattern of `skip`.
    """
    base = tiny_decoder(name, folder / "base", dtype=torch.float16)
    stored: dict[str, StoredTensor] = {}
    for path in base.glob("*.safetensors"):
        stored |= stored_tensors(path)
    locked = describe(base, {key: tensor.info for key, tensor in stored.items()})
    architecture = architecture_of(locked, name).leaving(skip)
    wanted = {tensor.name for tensor in checkpoint_tensors(architecture, variant)}
    tensors = {key: read_tensor(tensor) for key, tensor in stored.items() if key in wanted}
    dice = torch.Generator().manual_seed(0)
    for linear in architecture.linears:
        tensors |= random_linear(linear, variant, dice, spread)
    assert tensors.keys() == wanted
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    config = {
        **normalized(CONFIG, architecture.config, ModelFacts.of(architecture.config, architecture)).content,
        "quantization_config": quantization_config(variant, architecture),
    }
    (folder / "config.json").write_text(json.dumps(config))
    portable = portable_config(variant, architecture, BranchNames(repository="tester/tiny-GPTQ", weights_name="model"))
    (folder / "quantize_config.json").write_text(json.dumps(portable))
    write_tokenizer(folder)
    return architecture


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of made-up words: every build has one, and GPTQModel opens no checkpoint without."""
    words = {f"word{number}": number for number in range(VOCABULARY)}
    Tokenizer(WordLevel(words, unk_token="word0")).save(str(folder / "tokenizer.json"))  # noqa: S106 - a word
    ends = {"eos_token": "word2", "pad_token": "word0"}  # without them GPTQModel opens no Qwen3
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **ends}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _integers(rows: int, columns: int, bits: int, dice: torch.Generator) -> Tensor:
    """Return the integers of a weight.

    Those of 2 bits are drawn so that their mean is the middle: with equal shares it is half a step below, and a float16
    forward of our own then differed from float32 by 0.048 on one checkpoint (by 0.0005 on others).
    """
    if bits == 2:
        return torch.tensor([0, 1, 2, 3, 3, 3])[torch.randint(0, 6, (rows, columns), generator=dice)]
    return torch.randint(0, 2**bits, (rows, columns), generator=dice)


def random_linear(linear: LinearSpec, variant: Variant, dice: torch.Generator, spread: int = 1) -> dict[str, Tensor]:
    """Return a quantized linear's tensors but for its bias: weights of mean 0, and of a variance of 1 / in_features.

    Half of the scales are negative if the variant's are signed. The last group may be shorter.
    """
    rows, columns, bits = linear.in_features, linear.out_features, variant.bits
    groups = num_groups(rows, variant.group_size)
    g_idx = torch.arange(rows) // (rows if variant.group_size == -1 else variant.group_size)
    if variant.desc_act:
        g_idx = g_idx[torch.randperm(rows, generator=dice)]
    middle = 2 ** (bits - 1)
    zeros = torch.randint(middle - spread, middle + spread + 1, (groups, columns), generator=dice)
    scales = (0.5 + torch.rand(groups, columns, generator=dice)) * 12**0.5 / 2**bits * rows**-0.5
    if variant.scale_search == "signed":
        scales *= torch.randint(0, 2, (groups, columns), generator=dice) * 2 - 1
    found = {
        "qweight": pack(_integers(rows, columns, bits, dice), bits),
        "qzeros": pack_zeros(zeros, bits),
        "scales": scales.half(),
        "g_idx": g_idx.int(),
    }
    return {f"{linear.name}.{part}": tensor for part, tensor in found.items()}
