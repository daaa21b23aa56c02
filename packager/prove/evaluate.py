"""Stage 7, evaluate: measure on held-out text how far a quantized model is from the fp16 model.

Both models run block by block with weights that are read from disk, and logits exist for some hundred tokens at a time,
so a 13B model is evaluated in the memory of a few blocks (`evaluation_memory`).
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from packager.errors import QuantizeError
from packager.inputs.base_model import SourceModel
from packager.inputs.chat import Question
from packager.inputs.texts import TextSets
from packager.model.batches import rows_per_batch
from packager.model.decoder import Batch, Decoder, compute_dtype, run_blocks
from packager.model.devices import gpu_memory_errors
from packager.model.packing import CheckpointReader
from packager.model.stored_names import ReadTensor
from packager.prove.evaluation_memory import question_tokens, tokens_per_piece
from packager.prove.quality_figures import quality_record
from packager.receipt import QualityRecord

_HINT = (
    "raise --gpu-memory if it was given, end other programs on the GPU, or run build again with --device cpu: "
    "the quantized variants are kept"
)


@dataclass(frozen=True, kw_only=True)
class ForwardResult:
    """A model's forward over the held-out text.

    Attributes:
        decoder: the model; its blocks are not loaded.
        states: the last block's outputs on the CPU, [rows, seq_len, hidden_size] for each batch of held-out rows.
        answered: how many questions it answers.
    """

    decoder: Decoder
    states: Sequence[Tensor]
    answered: int


@torch.no_grad()
def run_texts(
    folder: Path,
    read: ReadTensor,
    texts: TextSets,
    *,
    names: Collection[str] | None = None,
    dequantized: Collection[str] = (),
    device: torch.device,
    dtype: torch.dtype,
) -> ForwardResult:
    """Run a model over the held-out rows and the questions, each block's weights read once per group of questions.

    Args:
        folder: with the model's config.json.
        read: the model's tensors.
        texts: held-out rows and questions.
        names: of the tensors that `read` has, see `Decoder`.
        dequantized: see `Decoder`.
        device: where to compute.
        dtype: of weights and activations.

    Raises:
        MachineError: the GPU's memory is exhausted.
        SourceError: a tensor is missing, or holds NaN or Inf.
    """
    with gpu_memory_errors(_HINT):
        decoder = Decoder(folder, read, names=names, dequantized=dequantized, device=device, dtype=dtype)
        batches = decoder.embed(texts.evaluation.ids, rows=_rows(texts.evaluation.ids, device))
        num_batches = len(batches)
        first, *others = _groups(texts.questions, texts.evaluation.ids.numel(), device) or [[]]
        states = _run_questions(decoder, batches, first)
        answered = _count_answered(decoder, first, states[num_batches:])
        del states[num_batches:]
        for group in others:
            answered += _count_answered(decoder, group, _run_questions(decoder, [], group))
        return ForwardResult(decoder=decoder, states=states, answered=answered)


def _groups(questions: Sequence[Question], num_tokens: int, device: torch.device) -> list[list[list[Question]]]:
    """Return groups of batches of questions; the questions of a batch are about equally long.

    The blocks' weights are read once per group. A group's states have a bound, `question_tokens`.
    """
    left = sorted(questions, key=_length, reverse=True)
    groups: list[list[list[Question]]] = []
    room = 0
    while left:
        width = _length(left[0])
        rows = rows_per_batch(width, device.type)
        batch, left = left[:rows], left[rows:]
        if not groups or len(batch) * width > room:
            groups.append([])
            room = question_tokens(num_tokens, device.type)
        groups[-1].append(batch)
        room -= len(batch) * width
    return groups


def _length(question: Question) -> int:
    return len(question.prompt_ids) + len(question.answer_ids)


def _run_questions(decoder: Decoder, batches: list[Batch], group: Sequence[Sequence[Question]]) -> list[Tensor]:
    """Return the last block's outputs on the CPU of `batches`, then of the batches of a group of questions."""
    for questions in group:
        batches += decoder.embed(_padded(questions), rows=len(questions))
    decoder.drop_outside_blocks()
    return [state.cpu() for state in run_blocks(decoder, batches)]


def _rows(ids: Tensor, device: torch.device) -> int:
    return rows_per_batch(ids.shape[1], device.type)


def _padded(questions: Sequence[Question]) -> Tensor:
    """Return prompts with their answers, int64 [questions, longest], padded on the right, where nothing attends."""
    width = max(map(_length, questions))
    ids = torch.zeros(len(questions), width, dtype=torch.int64)
    for row, question in enumerate(questions):
        tokens = question.prompt_ids + question.answer_ids
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids


def _count_answered(decoder: Decoder, group: Sequence[Sequence[Question]], states: Sequence[Tensor]) -> int:
    """Count the questions that greedy decoding answers exactly, including the end of the turn.

    Greedy decoding produces an answer if and only if each of its tokens is the most likely one after the prompt and the
    answer's tokens before it. So one forward over prompt and answer decides, without generating.
    """
    return sum(_answered(decoder, questions, rows) for questions, rows in zip(group, states, strict=True))


def _answered(decoder: Decoder, questions: Sequence[Question], rows: Tensor) -> int:
    lengths = [len(question.answer_ids) for question in questions]
    begins = [len(question.prompt_ids) - 1 for question in questions]
    hidden = torch.cat([row[begin : begin + n] for row, begin, n in zip(rows, begins, lengths, strict=True)])
    greedy = torch.cat(
        [decoder.logits(piece[None])[0].argmax(-1).cpu() for piece in torch.split(hidden, _piece(decoder))]
    )
    return sum(
        tuple(given.tolist()) == question.answer_ids
        for question, given in zip(questions, torch.split(greedy, lengths), strict=True)
    )


def run_base(source: SourceModel, texts: TextSets, device: torch.device) -> ForwardResult:
    """Run the fp16 base model; see `run_texts`."""
    dtype = compute_dtype(source.dtype, device)
    return run_texts(source.folder, source.read, texts, names=source.tensors, device=device, dtype=dtype)


def run_checkpoint(
    folder: Path, bits: int | None, source: SourceModel, texts: TextSets, device: torch.device
) -> ForwardResult:
    """Run a checkpoint with its weights dequantized, see `run_texts`; `bits` is None where linears have several."""
    dtype = compute_dtype(source.dtype, device)
    reader = CheckpointReader(folder, bits, device=device, dtype=dtype)
    return run_texts(
        folder, reader, texts, names=reader.names, dequantized=reader.dequantized, device=device, dtype=dtype
    )  # fmt: skip


@torch.no_grad()
def quality_of(base: ForwardResult, quantized: ForwardResult, texts: TextSets) -> QualityRecord:
    """Return the figures of a quantized model against the base model: see `QualityRecord`.

    Every position predicts the next token of its row; the last position of a row predicts nothing. From the logits on
    everything is float64: the KL divergence of 8 bits is a millionth of a nat, and a float32 log-probability is less
    exact than that.

    Raises:
        QuantizeError: a figure is not a finite number.
        MachineError: the GPU's memory is exhausted.
    """
    with gpu_memory_errors(_HINT):
        pieces = _pieces(base, quantized, texts.evaluation.ids)
        # On the GPU until all are there: a copy to the host would wait for each piece.
        compared = torch.cat([_compare(base.decoder, quantized.decoder, *piece) for piece in pieces], dim=1).cpu()
    figures = compared.view(len(compared), len(texts.evaluation.ids), -1).numpy()
    record = quality_record(*figures)
    _check_finite(record)
    return record.model_copy(
        update={
            "questions": len(texts.questions),
            "answered": quantized.answered,
            "base_answered": base.answered,
        }
    )


def _pieces(base: ForwardResult, quantized: ForwardResult, ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield both models' states [tokens, hidden_size] and the next token ids [tokens] of some hundred predictions.

    The states of a batch are on the device, so that the host can start the next pieces while one is computed.
    """
    size, begin = _piece(base.decoder), 0
    for base_states, states in zip(base.states, quantized.states, strict=True):
        following = ids[begin : begin + len(states), 1:].flatten()
        begin += len(states)
        device = base.decoder.device
        own = (torch.split(found.to(device)[:, :-1].flatten(0, 1), size) for found in (base_states, states))
        yield from zip(*own, torch.split(following, size), strict=True)


def _compare(base: Decoder, quantized: Decoder, p_states: Tensor, q_states: Tensor, ids: Tensor) -> Tensor:
    """Return the figures of a piece's predictions on the device, float64 [4, tokens].

    These are the losses of the quantized and the base model, KL(base || quantized), and 1 where both find the same
    token most likely. Three float64 tensors [tokens, vocab] exist at most: `evaluation_memory` counts them.
    """
    target = ids[:, None].to(base.device)
    p, q = _log_probabilities(base, p_states), _log_probabilities(quantized, q_states)
    base_loss, loss = (-found.gather(-1, target)[:, 0] for found in (p, q))
    equal = (p.argmax(-1) == q.argmax(-1)).double()
    difference = q.neg_().add_(p)
    kl = p.exp_().mul_(difference).sum(-1)
    return torch.stack([loss, base_loss, kl, equal])


def _log_probabilities(decoder: Decoder, states: Tensor) -> Tensor:
    """Return log-probabilities of the next token, float64 [tokens, vocab]."""
    logits = decoder.logits(states[None])[0].double()
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _piece(decoder: Decoder) -> int:
    return tokens_per_piece(decoder.vocab_size)


def _check_finite(record: QualityRecord) -> None:
    perplexity, base_perplexity, kl_divergence = record.perplexity, record.base_perplexity, record.kl_divergence
    if not all(math.isfinite(figure) for figure in (perplexity, base_perplexity, kl_divergence)):
        model = "quantized model" if math.isfinite(base_perplexity) else "base model"
        hint = "choose other parameters for this variant: the base model computes finite numbers"
        if model == "base model":
            hint = "the base model overflows in this dtype: check its weights"
        raise QuantizeError(
            f"the {model} computes NaN or Inf on the evaluation text",
            why=f"perplexity {perplexity:g}, of the base model {base_perplexity:g}, KL divergence {kl_divergence:g}",
            hint=hint,
        )
