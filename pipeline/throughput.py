"""What a GPU can compute at most, for model FLOPs utilisation."""

from __future__ import annotations

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


def peak_flops(device_name: str) -> float | None:
    """In FLOP/s, of a device as torch calls it; None of one that is not known, or of a slice of one (MIG),
    whose name is that of the whole."""
    if " MIG " in device_name:
        return None
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)
