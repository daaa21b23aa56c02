"""Train the demo model and measure it on the held-out text.

    python recipes/assets/demo-llama/train.py --out recipes/assets/demo-llama

One run writes model/, text/ and training.json under the output folder. A run with another device or other library
versions gives a model of the same quality, not the same bytes: only the text is bit-exact.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from corpus import CHAT_TEMPLATE, SEED, Question, documents, questions, text_files
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
VOCAB_SIZE = 1024
SEQ_LEN = 512
SHARDS = 16
MEASURE_LEN = 256

# Written by hand rather than by save_pretrained: transformers 4 reads torch_dtype and rope_theta, and transformers 5
# reads these spellings too but writes others, which version 4 would ignore.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": SEQ_LEN,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}
GENERATION_CONFIG = {"bos_token_id": BOS_ID, "do_sample": False, "eos_token_id": EOS_ID, "pad_token_id": UNK_ID}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Collect what shapes a training run; the defaults are those of the committed model."""

    seed: int
    documents: int
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Hold the tokenised training text: ids int16 [num_tokens] and the start of each document int64 [documents]."""

    ids: Tensor
    starts: Tensor

    def rows(self, batch_size: int, length: int, generator: torch.Generator) -> Tensor:
        """Draw token rows int64 [batch_size, length + 1].

        Half of them begin at a document, as prompts do; half begin anywhere, as the windows of a perplexity run do.
        """
        last = self.ids.numel() - length - 1
        anywhere = torch.randint(last, (batch_size,), generator=generator)
        chosen = torch.randint(self.starts.numel(), (batch_size // 2,), generator=generator)
        anywhere[: batch_size // 2] = self.starts[chosen].clamp(max=last)
        offsets = anywhere.to(self.ids.device).unsqueeze(1)
        return self.ids[offsets + torch.arange(length + 1, device=self.ids.device)].long()


def write_json(path: Path, content: object) -> None:
    """Write indented JSON with sorted keys and a final newline."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shard(seed: int, shard: int, count: int) -> list[str]:
    return list(islice(documents("train", seed, shard), count))


def training_texts(settings: Settings) -> list[str]:
    """Generate the training split; the shards are fixed, so the text does not depend on the number of processors."""
    count = -(-settings.documents // SHARDS)
    with ProcessPoolExecutor() as pool:
        futures = [pool.submit(_shard, settings.seed, shard, count) for shard in range(SHARDS)]
        return [text for future in futures for text in future.result()]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE of VOCAB_SIZE entries that splits numbers into digits and adds `<s>` on its own."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (UNK, BOS, EOS)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.replace(BOS, "").replace(EOS, "") for text in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the text gives only {tokenizer.get_vocab_size()} of {VOCAB_SIZE} vocabulary entries")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    content = json.loads(tokenizer.to_str())
    # tokenizers before 0.20 (transformers 4.40 pins one) read merges only as "a b"; later versions read both forms.
    content["model"]["merges"] = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": UNK, "unk_token": UNK}
    write_json(folder / "special_tokens_map.json", names)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    extra = {
        "added_tokens_decoder": {str(i): {"content": token} | flags for i, token in enumerate((UNK, BOS, EOS))},
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": SEQ_LEN,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", names | extra)


def encode(tokenizer: Tokenizer, texts: list[str]) -> Stream:
    """Tokenise each text with its `<s>` and join the ids into one stream."""
    pieces, lengths = [], []
    # In portions, because Python lists of all the ids would take gigabytes.
    for begin in range(0, len(texts), 20_000):
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts[begin : begin + 20_000])]
        pieces.append(torch.tensor([token for row in rows for token in row], dtype=torch.int16))
        lengths.append(torch.tensor([len(row) for row in rows]))
    counts = torch.cat(lengths)
    return Stream(ids=torch.cat(pieces), starts=counts.cumsum(0) - counts)


def learning_rate_factor(step: int, settings: Settings) -> float:
    """Return the linear warm-up and cosine decay to zero as a factor in 0..1."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def train(model: nn.Module, stream: Stream, settings: Settings, device: torch.device) -> float:
    """Train in place: float32 weights, bfloat16 activations on a GPU. Returns the last step's loss in nats."""
    generator = torch.Generator().manual_seed(settings.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))
    started_s = time.perf_counter()
    loss = torch.zeros(())
    for step in range(settings.steps):
        rows = stream.rows(settings.batch_size, SEQ_LEN, generator)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == settings.steps - 1:
            elapsed_s = time.perf_counter() - started_s
            print(f"step {step:5d}  loss {loss.item():.4f}  {elapsed_s:.1f} s", flush=True)
    return loss.item()


def save_model(model: nn.Module, folder: Path) -> None:
    """Write the weights as float16 safetensors, and the two configuration files."""
    weights = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", GENERATION_CONFIG)


def new_model() -> nn.Module:
    """Return a float32 model of CONFIG's shape with random weights."""
    return LlamaForCausalLM(LlamaConfig(**{key: value for key, value in CONFIG.items() if key != "torch_dtype"}))


def load_model(folder: Path) -> nn.Module:
    """Load the saved float16 weights into a float32 model on the CPU."""
    model = new_model()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.train(mode=False)


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """Return exp(mean loss in nats) over windows int64 [rows, MEASURE_LEN], each predicted from its own start."""
    total = 0.0
    for rows in torch.split(windows, 16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        total += functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / windows[:, 1:].numel())


def unigram_perplexity(train_ids: Tensor, windows: Tensor) -> float:
    """Return the perplexity on the same predicted tokens of the training frequencies (add-one smoothed)."""
    counts = torch.bincount(train_ids.long(), minlength=VOCAB_SIZE).double() + 1.0
    return math.exp(-(counts / counts.sum()).log()[windows[:, 1:]].mean().item())


@torch.inference_mode()
def answers(model: Any, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int = 40) -> list[str]:
    """Decode greedily, all prompts in one left-padded batch. Returns what follows `[/INST]` up to `</s>`, stripped."""
    tokenizer.enable_padding(direction="left", pad_id=UNK_ID, pad_token=UNK)
    batch = tokenizer.encode_batch([f"[INST] {prompt} [/INST]" for prompt in prompts])
    tokenizer.no_padding()
    ids = torch.tensor([row.ids for row in batch])
    mask = torch.tensor([row.attention_mask for row in batch])
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=EOS_ID,
        pad_token_id=UNK_ID,
    )
    return [text.strip() for text in tokenizer.decode_batch(output[:, ids.shape[1] :].tolist())]


def accuracy_by_kind(model: nn.Module, tokenizer: Tokenizer, asked: list[Question]) -> dict[str, float]:
    """Return the share of exactly right answers for every kind of question, and for "all"."""
    right: dict[str, list[bool]] = {"all": []}
    for item, given in zip(asked, answers(model, tokenizer, [item.prompt for item in asked]), strict=True):
        right["all"].append(given == item.answer)
        right.setdefault(item.kind, []).append(given == item.answer)
        if given != item.answer:
            print(f"wrong: {item.prompt!r} -> {given!r}, not {item.answer!r}")
    return {kind: round(sum(hits) / len(hits), 4) for kind, hits in right.items()}


def measure(folder: Path, train_ids: Tensor) -> dict[str, object]:
    """Measure the saved files in float32 on the CPU."""
    tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    model = load_model(folder / "model")
    lines = (folder / "text" / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    ids = encode(tokenizer, [json.loads(line)["text"] for line in lines]).ids.long()
    windows = ids[: ids.numel() // MEASURE_LEN * MEASURE_LEN].view(-1, MEASURE_LEN)
    asked = questions()
    return {
        "evaluation_tokens": windows[:, 1:].numel(),
        "window_tokens": MEASURE_LEN,
        "perplexity": round(perplexity(model, windows), 4),
        "unigram_perplexity": round(unigram_perplexity(train_ids, windows), 2),
        "questions": len(asked),
        "accuracy": accuracy_by_kind(model, tokenizer, asked),
    }


def parse_arguments() -> tuple[Path, Settings]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model and measure it on the held-out text.")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives model/, text/, training.json")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--documents", type=int, default=400_000, help="training documents to generate")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-size", type=int, default=128, help=f"rows of {SEQ_LEN} tokens per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    options = vars(parser.parse_args())
    return options.pop("out"), Settings(**options)


def describe_run(settings: Settings, device: torch.device) -> dict[str, object]:
    """Return what a reader needs to repeat the run; no paths and no host names."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"tokenizers": tokenizers.__version__, "transformers": transformers.__version__}
    return {"settings": vars(settings), "seq_len": SEQ_LEN, "device": name, "versions": versions}


def main() -> None:
    """Generate, tokenise, train, save, measure."""
    started_s = time.perf_counter()
    out, settings = parse_arguments()
    for name in ("model", "text"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for name, content in text_files(settings.seed).items():
        (out / "text" / name).write_text(content, encoding="utf-8")
    texts = training_texts(settings)
    tokenizer = train_tokenizer(texts[:: max(1, len(texts) // 20_000)])
    save_tokenizer(tokenizer, out / "model")
    stream = encode(tokenizer, texts)
    print(f"{len(texts)} documents, {stream.ids.numel()} tokens, {time.perf_counter() - started_s:.1f} s", flush=True)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    model = new_model().to(device).train()
    train_started_s = time.perf_counter()
    loss = train(model, Stream(ids=stream.ids.to(device), starts=stream.starts), settings, device)
    train_s = time.perf_counter() - train_started_s
    save_model(model, out / "model")
    figures = describe_run(settings, device) | measure(out, stream.ids)
    figures |= {"train_tokens": stream.ids.numel(), "train_loss": round(loss, 4), "train_s": round(train_s, 1)}
    figures |= {"parameters": sum(p.numel() for p in model.parameters())}
    write_json(out / "training.json", figures | {"total_s": round(time.perf_counter() - started_s, 1)})
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
