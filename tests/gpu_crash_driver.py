"""Quantize on a GPU in a process that a test may kill: print a line at the start, and the resumed blocks at the end."""

import sys
from pathlib import Path

import torch

from packager.quantize.job import BlockDone, QuantizeJob
from packager.quantize.sweep import quantize
from tests.sources import open_folder
from tests.tiny_models import open_store, token_rows, variant

VARIANTS = (
    variant(branch="a", group_size=128, scale_search=True),
    variant(branch="b", group_size=32, act_order="full"),
    variant(branch="c", bits=3, sym=False, group_size=64, true_sequential=False),
)


def main(model: str, work: str) -> None:
    device, resumed = torch.device("cuda", 0), []
    source = open_folder(Path(model))
    stores = {v: open_store(source, Path(work), v, device=device) for v in VARIANTS}
    job = QuantizeJob(source=source, rows=token_rows(64, 512, vocab_size=512), stores=stores, devices=(device,))
    print("begins", flush=True)
    quantize(job, lambda step: resumed.append(step.resumed) if isinstance(step, BlockDone) else None)
    print(sum(resumed), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
