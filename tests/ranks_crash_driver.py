"""Quantize on several ranks, and end as if killed while the second block is written: MODEL WORK RANKS."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from packager.model.batches import TOKENS_PER_BATCH
from packager.quantize import block_store
from packager.quantize.block_store import BlockStore
from packager.quantize.job import QuantizeJob
from packager.quantize.sweep import quantize
from tests.sources import open_folder
from tests.test_ranks import PLAIN
from tests.tiny_models import open_store, token_rows


def main(model: str, work: str, ranks: str) -> None:
    TOKENS_PER_BATCH["cpu"] = 32
    source, write = open_folder(Path(model)), BlockStore.write
    store = open_store(source, Path(work), PLAIN)

    def write_or_end(self: BlockStore, block: int, *rest: Any) -> None:
        if block == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, block, *rest)

    vars(block_store)["BlockStore"].write = write_or_end
    devices = (torch.device("cpu"),) * int(ranks)
    quantize(QuantizeJob(source=source, rows=token_rows(), stores={PLAIN: store}, devices=devices), lambda _: None)


if __name__ == "__main__":
    main(*sys.argv[1:])
