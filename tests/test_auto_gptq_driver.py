"""AutoGPTQ as an engine, without AutoGPTQ: the files that are exchanged, and the errors.

A fake script follows the protocol here; the real one meets the real AutoGPTQ in test_auto_gptq.py.
"""

import json
import logging
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from packager.errors import LoaderUnavailableError, MachineError, QuantizeError
from packager.prove.environments import environment_name
from packager.prove.loaders import LOADERS
from packager.quantize.engines import auto_gptq, auto_gptq_script
from packager.quantize.gptq.grid import GridRules, find_grids
from packager.quantize.job import BlockDone, LinearsDone
from packager.receipt import LinearRecord
from tests.fake_engine import SECRET, Bench
from tests.sources import open_folder
from tests.tiny_models import token_rows, variant


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path, monkeypatch)


# what the driver does with a script that works


def test_blocks_and_losses_are_stored_as_by_our_own_engine(bench):
    made = bench.make()
    assert made.made_with == "AutoGPTQ 0.7.1"
    assert made.versions["torch"] == "9.9"
    assert made.versions["gptq-packager"]
    names = [linear.name for linear in bench.source.architecture.linears]
    assert [record.name for record in made.records["main"]] == names
    assert made.records["main"][0] == LinearRecord(name=names[0], loss=0.5 + len(names[0]) / 1000, damp_percent=0.01)
    for block in range(3):
        tensors = bench.store.read(block)
        assert tensors is not None
        assert len(tensors) == 4 * 7
    assert not list((bench.folder / "work").glob(".tmp-*"))


def test_progress_is_reported_linear_by_linear_and_block_by_block(bench):
    bench.make()
    blocks = [report for report in bench.reports if isinstance(report, BlockDone)]
    assert [(done.branch, done.block, done.num_blocks, done.resumed) for done in blocks] == [
        ("main", block, 3, False) for block in range(3)
    ]
    linears = [report for report in bench.reports if isinstance(report, LinearsDone)]
    assert [done.block for done in linears] == [0] * 7 + [1] * 7 + [2] * 7
    assert blocks[0].loss == pytest.approx(sum(record.loss for done in linears[:7] for record in done.linears))


def test_the_script_gets_exactly_our_rows_and_parameters_and_no_secret(bench):
    bench.variant = variant(engine="auto-gptq", bits=3, sym=False, damp_percent=0.05, group_size=16, act_order="static")
    bench.make()
    seen = bench.seen
    assert seen["ids"] == token_rows().ids.tolist()
    assert seen["quantize"] == {
        "bits": 3, "group_size": 16, "damp_percent": 0.05, "desc_act": True, "static_groups": True, "sym": False,
        "true_sequential": True,
    }  # fmt: skip
    assert SECRET not in json.dumps(seen["environ"])
    assert seen["files"] == ["config.json", "model.safetensors"]
    assert seen["config"]["torch_dtype"] == "float16"


@pytest.mark.parametrize("fields", [{"act_order": "group"}, {"scale_search": True}, {"refine": True}], ids=str)
def test_a_variant_that_autogptq_cannot_make_is_refused_before_the_script_runs(bench, fields):
    bench.variant = variant(engine="auto-gptq", **fields)
    (name, value), *_ = fields.items()
    with pytest.raises(QuantizeError, match=f"engine auto-gptq cannot do {name} {value}"):
        bench.make()
    assert not bench.reports


def test_a_model_in_several_files_keeps_them_and_gets_an_index(tmp_path, monkeypatch):
    bench = Bench(tmp_path, monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(bench.source.folder, dtype=torch.float16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    bench.source = open_folder(tmp_path / "shards")
    bench.make()
    assert "model.safetensors.index.json" in bench.seen["files"]
    assert len(bench.seen["files"]) > 4


def test_biases_are_passed_on_if_the_base_model_has_some(tmp_path, monkeypatch):
    bench = Bench(tmp_path, monkeypatch, model="qwen2")
    bench.make()
    tensors = bench.store.read(0)
    assert tensors is not None
    assert [name for name in tensors if name.endswith("bias")] == [
        f"model.layers.0.self_attn.{name}_proj.bias" for name in "kqv"
    ]


# resuming


def test_a_variant_whose_blocks_are_all_finished_is_not_made_again(bench):
    first = bench.make()
    bench.reports.clear()
    again = bench.make("unavailable")
    assert again == first
    assert [report.resumed for report in bench.reports] == [True] * 3


def test_an_interrupted_variant_starts_again_at_its_first_block(bench):
    bench.fails("crashes")
    assert bench.finished == [0]
    bench.reports.clear()
    bench.make()
    assert bench.finished == [0, 1, 2]
    assert [done.block for done in bench.reports if isinstance(done, BlockDone)] == [0, 1, 2]


# errors


def test_a_crash_shows_the_last_output_and_no_secret(bench):
    error = bench.fails("crashes")
    assert isinstance(error, QuantizeError)
    assert (error.what, error.where) == ("engine auto-gptq did not finish", "main")
    assert error.why.startswith("exit status 3\nabout to crash with")
    assert SECRET not in str(error)
    assert "the variant starts at its first block" in error.hint


@pytest.mark.crash
def test_killed_hanging_and_stopped_scripts_have_different_errors(bench):
    assert bench.fails("is killed").why == signal.Signals(9).name.join(["killed by ", ""])
    assert bench.fails("hangs", silence_s=4.0).why == "it wrote no event for 4 s and was killed"
    assert bench.fails("stops early").why == "it stopped before its last block"


@pytest.mark.parametrize(
    ("behaviour", "kind", "what", "hint"),
    [
        ("factorization", QuantizeError, "the Hessian cannot be factored", "AutoGPTQ does not raise damping"),
        ("activations", QuantizeError, "activations failed\nand more", "native, which computes in the base model's"),
        ("scales", QuantizeError, "scales failed\nand more", "too large or too small"),
        ("memory", MachineError, "engine auto-gptq ran out of memory", "fewer or shorter calibration rows"),
        ("other", QuantizeError, "engine auto-gptq failed", "use engine: native"),
    ],
)
def test_an_error_of_the_script_names_branch_and_linear(bench, behaviour, kind, what, hint):
    error = bench.fails(behaviour)
    assert isinstance(error, kind)
    assert (error.what, error.where) == (what, "main, model.layers.1.self_attn.v_proj")
    assert hint in error.hint
    assert bench.finished == [0]
    if behaviour == "other":
        assert error.why.endswith("line 1\nline 2")


def test_an_environment_without_cuda_is_the_machines_fault(bench):
    error = bench.fails("unavailable")
    assert isinstance(error, MachineError)
    assert error.why == "torch 9.9 sees no CUDA GPU"


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        ("zero biases", "a block does not have the planned tensors: model.layers.0.mlp.down_proj.bias: planned None"),
        ("wide scales", "down_proj.scales: planned ('torch.float16', (3, 64)), got ('torch.float32', (3, 64))"),
        ("wrong order", "block 1 came instead of block 0"),
        ("no losses", "block 0 came without the loss of model.layers.0.self_attn.q_proj"),
        ("stranger", "lm_head is not a linear of this model"),
    ],
)
def test_unexpected_results_of_the_script_are_refused(bench, behaviour, why):
    error = bench.fails(behaviour)
    assert isinstance(error, QuantizeError)
    assert why in error.why
    assert "please report it" in error.hint
    assert bench.finished == []


def test_a_line_that_is_not_an_event_is_shown(bench):
    assert bench.fails("talks").why == "'Packing model...'"


def test_an_environment_that_cannot_be_made_is_the_machines_fault(bench, monkeypatch):
    def fail(*_):
        raise LoaderUnavailableError("the packages of autogptq could not be installed", why="pip: exit status 1")

    monkeypatch.setattr(auto_gptq, "ensure_environment", fail)
    error = bench.fails("")
    assert isinstance(error, MachineError)
    assert (error.why, error.hint) == ("pip: exit status 1", "use engine: native")


# the script's own parts


def test_autogptqs_loss_becomes_ours():
    """AutoGPTQ sums over weights with a Hessian of rows; ours is a mean over outputs with a Hessian of tokens."""
    x, error = torch.randn(6, 5, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    rows_total = float((x @ error.T).square().sum() / x.shape[0])
    expected = float((x @ error.T).square().sum((0, 1)).mean() / x[..., 0].numel())
    assert auto_gptq_script.loss_per_output(rows_total, x.shape[1], error.shape[0]) == pytest.approx(expected)


def test_losses_are_read_from_autogptqs_log():
    losses = auto_gptq_script.loss_log()
    logger = logging.getLogger(auto_gptq_script.LOSS_LOGGER)
    for text in ("duration: 0.25", "avg loss: 12.5", "avg loss: 1e-07"):
        logger.info(text)
    logger.handlers.clear()
    assert losses == [12.5, 1e-7]


@pytest.mark.parametrize(("seq_len", "rows"), [(8, 512), (2048, 2), (4096, 1), (8192, 1)])
def test_a_batch_has_a_bounded_number_of_tokens(seq_len, rows):
    assert auto_gptq_script.batch_size(seq_len) == rows


def test_activations_stay_on_the_gpu_only_where_they_fit():
    needed = auto_gptq_script.activation_bytes(128, 2048, 5120)
    assert needed == pytest.approx(2 * 2 * 128 * 2048 * 5120, rel=0.001)
    for free, limit, fits in (
        (2 * needed, None, True),
        (2 * needed - 2, None, False),
        (4 * needed, 2 * needed, True),
        (4 * needed, 2 * needed - 2, False),
    ):
        torch_ = SimpleNamespace(cuda=SimpleNamespace(mem_get_info=lambda free=free: (free, 80_000_000_000)))
        assert auto_gptq_script.fits_on_gpu(torch_, (128, 2048), 5120, limit) is fits


def test_the_gpu_memory_limit_reaches_the_script_and_torch(bench):
    bench.make(device_limit=12_000_000_000)
    assert bench.seen["gpu_memory_bytes"] == 12_000_000_000
    fractions = []
    cuda = SimpleNamespace(
        mem_get_info=lambda: (40_000_000_000, 48_000_000_000),
        set_per_process_memory_fraction=lambda *rest: fractions.append(rest),
    )
    auto_gptq_script.limit_gpu_memory(SimpleNamespace(cuda=cuda), bench.seen["gpu_memory_bytes"])
    auto_gptq_script.limit_gpu_memory(SimpleNamespace(cuda=cuda), None)
    assert fractions == [(0.25, 0)]


def test_only_tensors_of_a_checkpoint_are_selected():
    buffers = {kind: torch.zeros(2, 3).T for kind in ("qweight", "qzeros", "scales", "g_idx", "bias", "wf")}
    names = {"linear.qweight", "linear.qzeros", "linear.scales", "linear.g_idx"}
    assert auto_gptq_script.selected("linear", buffers, has_bias=False).keys() == names
    assert auto_gptq_script.selected("linear", buffers, has_bias=True).keys() == names | {"linear.bias"}
    assert all(tensor.is_contiguous() for tensor in auto_gptq_script.selected("l", buffers, has_bias=True).values())


def test_a_zero_of_0_is_moved_as_our_own_grids_do():
    x = torch.tensor([[0.5, 0.25, 0.75], [-0.5, 0.25, 0.0], [-0.01, 0.9, 0.3]])
    high, low = x.amax(1, keepdim=True).clamp(min=0), x.amin(1, keepdim=True).clamp(max=0)
    scale = (high - low) / 15
    quantizer = SimpleNamespace(scale=scale, zero=torch.round(-low / scale), maxq=torch.tensor(15))
    assert quantizer.zero[:, 0].tolist() == [0, 10, 0]
    auto_gptq_script.avoid_zero(torch, quantizer, x)
    rules = GridRules(bits=4, sym=False, scale_search=False)
    scales, zeros = find_grids(x.T.contiguous(), 3, rules, torch.ones(3))
    assert torch.equal(quantizer.zero.T, zeros)
    assert torch.allclose(quantizer.scale.T, scales, rtol=1e-3)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (auto_gptq_script.FailureError("scales", "x", "a"), "scales"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (MemoryError(), "memory"),
        (ModuleNotFoundError("No module named 'auto_gptq'"), "unavailable"),
        (ValueError("x"), "other"),
        (SystemExit(1), "other"),
    ],
)
def test_every_error_has_a_kind(error, kind):
    assert auto_gptq_script.described(error)["kind"] == kind


def test_output_of_libraries_does_not_reach_the_protocol():
    code = (
        "from packager.quantize.engines import auto_gptq_script as s; import os; emit = s.protocol()\n"
        "print('chatter', flush=True); os.write(1, b'deep chatter\\n'); os.system('echo child'); emit({'event': 'x'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == '{"event": "x"}\n'
    assert done.stderr == "chatter\ndeep chatter\nchild\n"


@pytest.mark.slow
def test_the_script_without_cuda_reports_it(tmp_path):
    (tmp_path / "job.json").write_text("{}")
    command = [sys.executable, "-I", auto_gptq_script.__file__, str(tmp_path / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"CUDA_VISIBLE_DEVICES": ""})
    event = json.loads(done.stdout)
    assert (done.returncode, event["event"], event["kind"]) == (1, "error", "unavailable")
    assert event["message"].endswith("sees no CUDA GPU")


def test_the_script_refuses_the_network(tmp_path):
    script = tmp_path / "reach.py"
    script.write_text(
        f"import runpy, socket\nrunpy.run_path({str(auto_gptq.SPEC.script)!r})['isolated'].forbid_network()\n"
        "socket.getaddrinfo('localhost', 80)\n"
    )
    done = subprocess.run([sys.executable, "-I", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "must not use the network: socket.getaddrinfo" in done.stderr


def test_the_engine_uses_the_loaders_environment():
    assert environment_name(auto_gptq.SPEC) == environment_name(LOADERS["autogptq"])
