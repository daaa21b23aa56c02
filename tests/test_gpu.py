"""The same engine on a CUDA GPU: run with `nox -s tests-gpu`; without a GPU these fail, they do not skip."""

import pytest
import torch

from packager.decoder import Decoder, forward
from packager.gptq.hessian import Hessian, factorize
from packager.gptq.layout import pack, unpack
from packager.gptq.solve import GridRules, solve
from packager.quantize import QuantizeJob, quantize
from packager.source import read_source
from tests.gptq_reference import gptq
from tests.tiny_models import CONFIGS, open_store, save_model, token_rows, variant

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _gpu() -> None:
    assert torch.cuda.is_available(), "these tests need a CUDA GPU"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_hessian_of_half_precision_inputs_is_accumulated_in_float32(dtype):
    x = torch.randn(4096, 256, device=CUDA).to(dtype)
    hessian = Hessian(256, CUDA)
    for part in x.split(512):
        hessian.add(part)
    expected = 2 * x.double().T @ x.double() / x.shape[0]
    error = (hessian.matrix().double() - expected).norm() / expected.norm()
    assert error < 1e-5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 48, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [False, True])
def test_solver_agrees_with_the_float64_reference(bits, group_size, sym, desc_act):
    x = torch.randn(2048, 96) * torch.rand(96).mul(3) @ (torch.eye(96) + 0.1 * torch.randn(96, 96))
    H = 2 * x.T @ x / x.shape[0]
    weight = torch.randn(96, 24) * 0.02
    expected = gptq(weight, H, bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, damp=0.01)
    factor = factorize(H.to(CUDA), desc_act=desc_act, damp_percent=0.01)
    rules = GridRules(bits=bits, group_size=group_size, sym=sym, static_groups=False, scale_search=False)
    found = solve(weight.to(CUDA), factor, rules)
    assert found.g_idx.tolist() == expected.g_idx
    assert (found.q.cpu().double() == expected.q).double().mean() >= (0.95 if bits == 8 else 0.98)
    assert float(found.losses.sum()) == pytest.approx(float(expected.losses.sum()), rel=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_gives_the_bytes_of_the_cpu(bits):
    values = torch.randint(0, 2**bits, (128, 40), dtype=torch.uint8)
    packed = pack(values.to(CUDA), bits)
    assert torch.equal(packed.cpu(), pack(values, bits))
    assert torch.equal(unpack(packed, bits).cpu(), values)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_quantizes_as_on_the_cpu(tmp_path, name):
    source = read_source(save_model(tmp_path / "model", name), base_id="test/model")
    variants = variant(branch="main"), variant(branch="act", desc_act=True, group_size=16)
    losses = {}
    for device in (torch.device("cpu"), CUDA):
        stores = {v: open_store(source, tmp_path / device.type, v, device=device) for v in variants}
        records = quantize(
            QuantizeJob(source=source, rows=token_rows(), stores=stores, devices=(device,)), lambda _: None
        )
        losses[device.type] = torch.tensor([record.loss for found in records.values() for record in found])
    # float16 activations move single roundings; the sum over a model's linears hardly moves.
    assert float(losses["cuda"].sum()) == pytest.approx(float(losses["cpu"].sum()), rel=0.05)


def test_the_same_gpu_gives_the_same_bytes_twice(tmp_path):
    source = read_source(save_model(tmp_path / "model", "llama"), base_id="test/model")
    v, made = variant(desc_act=True), []
    for run in ("first", "second"):
        store = open_store(source, tmp_path / run, v, device=CUDA)
        quantize(QuantizeJob(source=source, rows=token_rows(), stores={v: store}, devices=(CUDA,)), lambda _: None)
        made.append((store.checkpoint / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_streamed_forward_in_float32_equals_the_cpu(tmp_path):
    source = read_source(save_model(tmp_path / "model", "llama"), base_id="test/model")
    ids = token_rows().ids
    logits = []
    for device in (torch.device("cpu"), CUDA):
        decoder = Decoder(source.folder, source.read, device=device, dtype=torch.float32)
        (state,) = forward(decoder, ids, rows=64)
        logits.append(decoder.logits(ids, state).cpu())
    assert (logits[0] - logits[1]).norm() / logits[0].norm() < 1e-4
