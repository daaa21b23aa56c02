"""A loader's run, for the receipt and for the log."""

from typing import TYPE_CHECKING

from packager.model.devices import device_name
from packager.prove.probes import ProbeResult
from packager.receipt import LoaderRecord, LoaderRunRecord
from packager.system.processor import processor_name

if TYPE_CHECKING:
    import torch


def run_record(
    name: str, result: ProbeResult, rows: "torch.Tensor", device: "torch.device", *, beside: int
) -> LoaderRunRecord:
    """Return the time and memory of a run.

    Args:
        name: of the loader.
        result: what it reports.
        rows: token ids [num_rows, seq_len] whose logits it computed.
        device: of the build: where the loader says "cuda", this GPU.
        beside: how many loaders ran at the same time, itself counted.
    """
    return LoaderRunRecord(
        loader=name,
        device=result.device,
        load_s=round(result.load_s, 3),
        forward_s=round(result.forward_s, 4),
        num_tokens=rows.numel(),
        seq_len=rows.shape[1],
        peak_memory_bytes=result.peak_memory_bytes,
        beside=beside,
        decode_tokens=result.decode_tokens,
        decode_s=None if result.decode_s is None else round(result.decode_s, 4),
        machine=processor_name() if result.device == "cpu" else device_name(device),
    )


def result_line(branch: str, record: LoaderRecord) -> str:
    """Return a loader's result on a branch as a line of the log."""
    figures = ""
    if record.relative_error is not None:
        figures = f", relative error {record.relative_error:.4f}, top-1 {record.top1_agreement:.3f}"
    reason = f": {record.reason}" if record.reason else ""
    return f"  {branch}: {record.loader} {record.status}{figures}{reason}"
