"""Arithmetic of a training step, for model FLOPs utilisation."""

from __future__ import annotations

from pipeline.config import LlamaConfig

# Dense bfloat16 peak in FLOP/s (NVIDIA data sheets, without sparsity), by a part of the device name; the
# first that fits counts. GH200 is an H200 here: it has the same cores as the SXM boards.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}


def flops_per_token(model: LlamaConfig, sequence_length: int) -> float:
    """Forward and backward pass: 6 per parameter outside the embedding, and 12·L·T·D for attention scores
    (Chowdhery et al. 2022, PaLM, appendix B)."""
    matrices = model.parameters - (0 if model.tied else model.vocab * model.width)
    return 6.0 * matrices + 12.0 * model.layers * model.width * sequence_length


def peak_flops(device_name: str) -> float | None:
    """None of a device that is not known, or of a slice of one (MIG), whose name is that of the whole."""
    if " MIG " in device_name:
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)
