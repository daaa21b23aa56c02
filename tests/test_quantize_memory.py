"""The memory that a process takes to quantize, against the plan; what its libraries take is not part of the plan."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from packager.quantize.memory import sweep_ways
from packager.quantize.workload import Workload
from tests.sources import open_folder
from tests.tiny_models import save_model

ROWS, LENGTH = 8, 64
SCRIPT = """
import json
import sys
from pathlib import Path

import torch

from packager.quantize.job import QuantizeJob
from packager.quantize.sweep import quantize
from packager.quantize import tune_block
from packager.quantize.tuning_schedule import TuningSchedule
from packager.system.heap import return_large_blocks
from tests.sources import open_folder
from tests.tiny_models import open_store, token_rows, variant

STATUS = Path("/proc/self/status")
tune_block.SCHEDULE = TuningSchedule(steps=2, checks=1, rate=0.004, scale_rate=0.0001)

def held(key):
    return int(next(line for line in STATUS.read_text().splitlines() if line.startswith(key)).split()[1]) * 1024

def run(folder, work):
    source, v = open_folder(Path(folder)), variant(group_size=32, **json.loads(sys.argv[5]))
    rows = token_rows(int(sys.argv[3]), int(sys.argv[4]))
    job = QuantizeJob(source=source, rows=rows, stores={v: open_store(source, work, v)}, devices=(torch.device("cpu"),))
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    quantize(job, lambda _: None)
    return held("VmHWM") - before

return_large_blocks()
run(sys.argv[1], Path("first"))  # loads what libraries load when they are first used
print(run(sys.argv[2], Path("second")))
"""


def used_by_child(tmp_path: Path, folder: Path, **fields: Any) -> int:
    command = [sys.executable, "-c", SCRIPT, str(save_model(tmp_path / "small", "llama")), str(folder)]
    ran = subprocess.run(
        [*command, str(ROWS), str(LENGTH), json.dumps(fields)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout.splitlines()[-1])


# By what takes most: an embedding, with its head or without one; the blocks.
SIZES: dict[str, dict[str, Any]] = {
    "tied": {"vocab_size": 131072, "hidden_size": 512, "intermediate_size": 512, "tie_word_embeddings": True},
    "untied": {"vocab_size": 131072, "hidden_size": 512, "intermediate_size": 512, "tie_word_embeddings": False},
    "blocks": {"vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 4096, "tie_word_embeddings": True},
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize(
    ("name", "dtype", "correction"),
    [
        ("tied", torch.bfloat16, 0.0),
        ("untied", torch.bfloat16, 0.0),
        pytest.param("untied", torch.float32, 0.0, marks=pytest.mark.long),
        pytest.param("blocks", torch.bfloat16, 0.0, marks=pytest.mark.long),
        ("blocks", torch.bfloat16, 0.5),
    ],
)
def test_the_peak_of_a_process_is_the_planned_one(
    tmp_path: Path, name: str, dtype: torch.dtype, correction: float
) -> None:
    config = LlamaConfig(**SIZES[name], num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(tmp_path / "model")
    work = Workload(
        architecture=open_folder(tmp_path / "model").architecture, num_samples=ROWS, seq_len=LENGTH, num_variants=1,
        packed_bits=4.625, corrected=correction > 0,
    )  # fmt: skip
    planned = next(sweep_ways(work, "cpu")).device_bytes
    assert planned > 200e6, "so much that what libraries take does not matter"
    used = used_by_child(tmp_path, tmp_path / "model", target_correction=correction)
    assert used == pytest.approx(planned, rel=0.2)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_peak_of_tuning_is_within_the_plan(tmp_path: Path) -> None:
    """The plan counts every tensor that a step may need at once, so it may be more than the peak, and never less."""
    config = LlamaConfig(**SIZES["blocks"], num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    architecture = open_folder(tmp_path / "model").architecture
    work = Workload(
        architecture=architecture, num_samples=ROWS, seq_len=LENGTH, packed_bits=4.625, num_variants=1, tuned=True
    )
    planned = next(sweep_ways(work, "cpu")).device_bytes
    used = used_by_child(tmp_path, tmp_path / "model", effort="high")
    assert 0.6 * planned < used < 1.05 * planned
