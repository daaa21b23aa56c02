"""Stage 8, evaluate: what quantizing cost, measured on held-out text against the fp16 model.

Both models run block by block, their weights read from disk, so a 13B model is evaluated in the memory of a few blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from packager.errors import QuantizeError
from packager.inputs.base_model import SourceModel
from packager.inputs.texts import Question, TextSets
from packager.model.batches import rows_per_batch
from packager.model.decoder import Decoder, ReadTensor, compute_dtype, forward
from packager.model.packing import checkpoint_reader
from packager.receipt import QualityRecord


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model's last hidden states on the held-out text, and how many questions it answered."""

    decoder: Decoder
    states: Sequence[Tensor]
    answered: int


def measure(
    folder: Path,
    read: ReadTensor,
    texts: TextSets,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Measured:
    """Run a model over the held-out rows and the questions.

    Args:
        folder: with the model's config.json.
        read: the model's tensors.
        texts: held-out rows and questions.
        device: where to compute.
        dtype: of weights and activations.
    """
    decoder = Decoder(folder, read, device=device, dtype=dtype)
    ids = texts.evaluation.ids
    states = forward(decoder, ids, rows=rows_per_batch(ids.shape[1], device.type))
    return Measured(decoder=decoder, states=states, answered=count_answered(decoder, texts.questions))


@torch.no_grad()
def count_answered(decoder: Decoder, questions: Sequence[Question]) -> int:
    """Count the questions that greedy decoding answers exactly, up to and including the end of the turn.

    Greedy decoding gives precisely an answer if and only if each of its tokens is the most likely one after the prompt
    and the answer's tokens before it; so one forward over prompt and answer decides, without generating.
    """
    if not questions:
        return 0
    width = max(len(question.prompt_ids) + len(question.answer_ids) for question in questions)
    ids = torch.zeros(len(questions), width, dtype=torch.int64)
    for row, question in enumerate(questions):
        tokens = question.prompt_ids + question.answer_ids
        ids[row, : len(tokens)] = torch.tensor(tokens)
    rows = rows_per_batch(width, decoder.device.type)
    states = forward(decoder, ids, rows=rows)
    greedy = torch.cat(
        [
            decoder.logits(part, state).argmax(-1).cpu()
            for part, state in zip(torch.split(ids, rows), states, strict=True)
        ]
    )
    answered = 0
    for row, question in enumerate(questions):
        begin = len(question.prompt_ids) - 1
        answered += greedy[row, begin : begin + len(question.answer_ids)].tolist() == list(question.answer_ids)
    return answered


def measure_base(source: SourceModel, texts: TextSets, device: torch.device) -> Measured:
    """Run the fp16 base model; see `measure`."""
    return measure(source.folder, source.read, texts, device=device, dtype=compute_dtype(source.record.dtype, device))


def measure_checkpoint(folder: Path, bits: int, source: SourceModel, texts: TextSets, device: torch.device) -> Measured:
    """Run a quantized checkpoint through our own dequantized forward; see `measure`."""
    reader = checkpoint_reader(folder, bits)
    return measure(folder, reader, texts, device=device, dtype=compute_dtype(source.record.dtype, device))


@torch.no_grad()
def compare(base: Measured, quantized: Measured, texts: TextSets) -> QualityRecord:
    """Return perplexity of both models, KL(base || quantized) in nats per token and top-1 agreement.

    Every position predicts the next token of its row; the last position of a row predicts nothing.

    Raises:
        QuantizeError: one of them is not a finite number.
    """
    loss = base_loss = kl = torch.zeros((), dtype=torch.float64)
    equal = count = 0
    for ids, p_logits, q_logits in _chunks(base, quantized, texts.evaluation.ids):
        target = ids[:, 1:, None].to(p_logits.device)
        p, q = p_logits[:, :-1].log_softmax(-1), q_logits[:, :-1].log_softmax(-1)
        base_loss = base_loss - p.gather(-1, target).double().sum().cpu()
        loss = loss - q.gather(-1, target).double().sum().cpu()
        kl = kl + (p.exp() * (p - q)).sum(-1).double().sum().cpu()
        equal += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += target.numel()
    perplexity, base_perplexity, kl_divergence = (float(value) for value in _means(loss, base_loss, kl, count))
    return QualityRecord(
        num_tokens=count,
        perplexity=perplexity,
        base_perplexity=base_perplexity,
        kl_divergence=kl_divergence,
        top1_agreement=equal / count,
        questions=len(texts.questions),
        answered=quantized.answered,
        base_answered=base.answered,
    )


def _means(loss: Tensor, base_loss: Tensor, kl: Tensor, count: int) -> Tensor:
    means = torch.stack([(loss / count).exp(), (base_loss / count).exp(), kl / count])
    if not bool(torch.isfinite(means).all()):
        raise QuantizeError(
            "the quantized or the base model computes NaN or Inf on the evaluation text",
            why=f"perplexity {means[0]:g}, of the base model {means[1]:g}, KL divergence {means[2]:g}",
            hint="the base model overflows in this dtype: check its weights",
        )
    return means


def _chunks(base: Measured, quantized: Measured, ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield ids and both models' float32 logits for a batch at a time: all logits at once would not fit."""
    begin = 0
    for p, q in zip(base.states, quantized.states, strict=True):
        part = ids[begin : begin + p.shape[0]]
        begin += p.shape[0]
        yield part, base.decoder.logits(part, p), quantized.decoder.logits(part, q)
