"""What a GPU can compute at most, for model FLOPs utilisation."""

from __future__ import annotations

# Dense bfloat16 peak in FLOP/s (NVIDIA data sheets, without sparsity), by a part of the device name.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def peak_flops(device_name: str) -> float | None:
    """In FLOP/s, of a device as torch calls it; None of an unknown one."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)
