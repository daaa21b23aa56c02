"""Solve and pack linears with AutoGPTQ's own classes on the CPU: `python auto_gptq_oracle.py CASES.json`.

Run in AutoGPTQ's environment by tests/test_auto_gptq.py. A case is an object: input and output (.safetensors), bits,
group_size, desc_act, sym, static_groups, damp_percent. Input holds weight [out, in] and x [rows, seq_len, in]; output
gets the packed tensors and the loss per output feature and token.

AutoGPTQ solves with float32 scales and stores them as fp16; ours are rounded first. Here its scales are rounded first
too, so that both solve the same problem; nothing else is changed.
"""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from auto_gptq.quantization import gptq, quantizer
from safetensors.torch import load_file, save_file

ENGINES = Path(__file__).resolve().parents[1] / "packager" / "quantize" / "engines"
SCRIPT = runpy.run_path(str(ENGINES / "auto_gptq_script.py"))
torch.cuda.synchronize = lambda: None
torch.cuda.empty_cache = lambda: None

find_params = quantizer.Quantizer.find_params


def find_fp16_params(self, x, weight=False):
    find_params(self, x, weight=weight)
    self.scale = self.scale.half().float()
    if not self.sym:
        low = x.flatten(1).amin(1).clamp(max=0).reshape(self.scale.shape)
        high = x.flatten(1).amax(1).clamp(min=0).reshape(self.scale.shape)
        low = torch.where((low == 0) & (high == 0), -1.0, low)
        self.zero = torch.clamp(torch.round(-low / self.scale), 0, self.maxq)
        SCRIPT["avoid_zero"](torch, self, x)
        self.scale = self.scale.half().float()


quantizer.Quantizer.find_params = find_fp16_params


def solve(case):
    given = load_file(case["input"])
    linear = torch.nn.Linear(*reversed(given["weight"].shape), bias=False)
    linear.weight.data = given["weight"].clone()
    solver = gptq.GPTQ(linear)
    solver.quantizer.configure(case["bits"], perchannel=True, sym=case["sym"], mse=False)
    for part in given["x"].split(3):
        solver.add_batch(part, None)
    rows = solver.nsamples
    losses = SCRIPT["loss_log"]()
    grid = solver.fasterquant(
        percdamp=case["damp_percent"], group_size=case["group_size"], actorder=case["desc_act"],
        static_groups=case["static_groups"],
    )  # fmt: skip
    loss = SCRIPT["loss_per_output"](losses[-1] * rows, given["x"].shape[1], linear.out_features)
    packed = SCRIPT["pack"](torch, linear.half(), grid, SimpleNamespace(**case))
    save_file(
        {**SCRIPT["selected"]("linear", packed, has_bias=False), "loss": torch.tensor(loss, dtype=torch.float64)},
        case["output"],
    )


for each in json.loads(Path(sys.argv[1]).read_text()):
    solve(each)
