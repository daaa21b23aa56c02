"""A transformers decoder that is visited one block at a time: its weights come from disk and go again.

The model is built on the meta device, so it costs no memory; embeddings, norms and head are loaded once, blocks when
their turn comes. What a block is called with besides the hidden states (positions, masks, rotary tables) is recorded
from the model's own forward, so nothing here knows any architecture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from packager.errors import SourceError

BLOCK_PREFIX = "model.layers"
# Batches that stay in a CPU's cache are 15 % faster there than these large ones, which a GPU needs to be busy.
_TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 16384}
ReadTensor = Callable[[str], Tensor]
Context = Mapping[str, Any]


def rows_per_batch(seq_len: int, device: torch.device) -> int:
    """Return how many rows of `seq_len` tokens travel together."""
    return max(1, _TOKENS_PER_BATCH[device.type] // seq_len)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows that travel through the blocks together.

    Attributes:
        hidden: [rows, seq_len, hidden_size].
        contexts: for each block, the keyword arguments its forward gets.
    """

    hidden: Tensor
    contexts: Sequence[Context]


class Decoder:
    """A causal language model, block by block.

    Args:
        folder: with config.json (a checkpoint's quantization_config is ignored: weights come from `read`).
        read: returns a named tensor on the CPU, in any float dtype.
        device: where blocks are computed.
        dtype: of weights and activations.

    Raises:
        SourceError: transformers cannot build this architecture, or a tensor is missing.
    """

    def __init__(self, folder: Path, read: ReadTensor, *, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._read = read
        self._model = _skeleton(folder, dtype)
        self.blocks = cast(nn.ModuleList, self._model.get_submodule(BLOCK_PREFIX))
        self._tied = bool(getattr(self._model.config, "tie_word_embeddings", False))
        self._load_outside_blocks()

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.blocks)

    def block_weights(self, index: int) -> dict[str, Tensor]:
        """Read the tensors of a block from disk: names relative to the block, on the device, in `dtype`.

        Raises:
            SourceError: a tensor holds NaN or Inf.
        """
        prefix = f"{BLOCK_PREFIX}.{index}."
        weights = {}
        for name in self.blocks[index].state_dict():
            tensor = self._read(prefix + name).to(self.device, self.dtype)
            if not bool(torch.isfinite(tensor).all()):
                raise SourceError(
                    "the weights contain NaN or Inf", where=prefix + name, hint="the base model is damaged"
                )
            weights[name] = tensor
        return weights

    def load_block(self, index: int, weights: Mapping[str, Tensor]) -> nn.Module:
        """Give a block its weights (copies, so that they may be overwritten) and return it."""
        block = self.blocks[index]
        block.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
        return block.requires_grad_(False)

    def drop_block(self, index: int) -> None:
        """Free a block's weights."""
        self.blocks[index].to("meta")

    @torch.no_grad()
    def embed(self, ids: Tensor, *, rows: int) -> list[Batch]:
        """Return the first block's inputs for token ids [num_samples, seq_len], `rows` to a batch."""
        return [self._embed_batch(part.to(self.device)) for part in torch.split(ids, rows)]

    def _embed_batch(self, ids: Tensor) -> Batch:
        inputs: list[Tensor] = []
        contexts: list[Context] = []

        def record(hidden: Tensor, **context: Any) -> Tensor:
            inputs.append(hidden)
            contexts.append(context)
            return hidden

        self._forward_with(record, ids)
        return Batch(hidden=inputs[0], contexts=tuple(contexts))

    @torch.no_grad()
    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return float32 logits [rows, seq_len, vocab] of the last block's outputs for the token ids they belong to."""

        def replace(_: Tensor, **context: Any) -> Tensor:  # noqa: ARG001
            return hidden

        return self._forward_with(replace, ids.to(self.device)).float()

    def _forward_with(self, block_forward: Callable[..., Tensor], ids: Tensor) -> Tensor:
        """Run the model's own forward with every block replaced by a function."""
        originals = [block.forward for block in self.blocks]
        for block in self.blocks:
            block.forward = block_forward
        try:
            return cast(Tensor, self._model(input_ids=ids, use_cache=False).logits)
        finally:
            for block, original in zip(self.blocks, originals, strict=True):
                block.forward = original

    def _load_outside_blocks(self) -> None:
        state = {}
        for name in self._model.state_dict():
            if name.startswith(BLOCK_PREFIX + "."):
                continue
            source = "model.embed_tokens.weight" if name == "lm_head.weight" and self._tied else name
            state[name] = self._read(source).to(self.device, self.dtype)
        self._model.load_state_dict(state, strict=False, assign=True)
        for name, module in list(self._model.named_modules()):
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                self._model.set_submodule(name, self._rebuilt(name, module))

    def _rebuilt(self, name: str, module: nn.Module) -> nn.Module:
        """Return a module whose buffers are computed, not stored (rotary tables), built again on the device."""
        try:
            return type(module)(self._model.config).to(self.device)
        except TypeError as error:
            raise SourceError(
                "this architecture computes a buffer that cannot be rebuilt", where=name, why=str(error)
            ) from error


def _skeleton(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            build = cast(Callable[..., nn.Module], AutoModelForCausalLM.from_config)
            model = build(config, dtype=dtype, attn_implementation="sdpa")
    except (ValueError, KeyError, OSError) as error:
        raise SourceError("transformers cannot build this model", where=str(folder), why=str(error)) from error
    return model.eval()


@torch.no_grad()
def forward(
    decoder: Decoder,
    ids: Tensor,
    *,
    rows: int,
) -> list[Tensor]:
    """Run token ids [num_samples, seq_len] through every block, `rows` to a batch; return the last hidden states."""
    batches = decoder.embed(ids, rows=rows)
    states = [batch.hidden for batch in batches]
    for index in range(len(decoder)):
        block = decoder.load_block(index, decoder.block_weights(index))
        for number, batch in enumerate(batches):
            states[number] = run_block(block, states[number], batch.contexts[index])
        decoder.drop_block(index)
    return states


def run_block(block: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    """Call a block; return its hidden states (some architectures wrap them in a tuple)."""
    output = block(hidden, **context)
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
