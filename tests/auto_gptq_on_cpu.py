"""The engine's script with the CPU in CUDA's place: AutoGPTQ itself, unchanged, for tests on machines without a GPU."""

import runpy
import sys
from pathlib import Path

import auto_gptq.modeling._base as loop
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "packager" / "quantize" / "engines" / "auto_gptq_script.py"

loop.CUDA_0 = torch.device("cpu")
torch.cuda.is_available = lambda: True
torch.cuda.synchronize = lambda: None
torch.cuda.empty_cache = lambda: None
torch.cuda.mem_get_info = lambda: (1 << 40, 1 << 40)
torch.cuda.max_memory_allocated = lambda: 0

sys.exit(runpy.run_path(str(SCRIPT))["main"](sys.argv[1]))
