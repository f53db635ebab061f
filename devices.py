# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
Choice of the device and of the compute dtype.

The compute dtype is separate from the storage dtype: a CPU without bfloat16 instructions is four times slower in
bfloat16 than in float32. Every command that runs a model calls `choose_dtype`.
"""

import platform

import torch


DTYPES = ("auto", "float32", "bfloat16", "float16")


def choose_device(requested: str | torch.device | None = None) -> torch.device:
    """
    Return the requested device; if None, the GPU if there is one, else the CPU.

    Raises:
        ValueError: The device does not exist or cannot be used.
    """
    if requested is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=requested).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(requested)!r} cannot be used: {str(error).splitlines()[0]}") from error


def choose_dtype(
    stored: torch.dtype, device: str | torch.device, requested: str | torch.dtype = "auto"
) -> tuple[torch.dtype, str]:
    """
    Return the compute dtype and a short reason for it.

    Args:
        stored: Dtype of the stored weights.
        device: Device that the model runs on.
        requested: "auto" keeps `stored` where the device computes in it natively and takes float32 elsewhere, so
            precision is never lowered silently. Any other dtype, or its name, is returned as it is.

    Raises:
        ValueError: `requested` is not a floating-point dtype.
    """
    device = torch.device(device)
    if requested != "auto":
        dtype = getattr(torch, requested, None) if isinstance(requested, str) else requested
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {requested!r}")
        slow = f"; not native on this {device.type}, float32 is faster"
        return dtype, "as requested" + ("" if computes_natively(dtype, device) else slow)
    if computes_natively(stored, device):
        return stored, "dtype of the stored weights"
    return torch.float32, f"the weights are {dtype_name(stored)}, which is not native on this {device.type}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module: "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def computes_natively(dtype: torch.dtype, device: str | torch.device) -> bool:
    """Return whether a device has instructions for a dtype, rather than converting every operand to another one."""
    device = torch.device(device)
    if dtype == torch.bfloat16:
        return _has_bfloat16(device)
    if dtype == torch.float16:
        return device.type != "cpu"
    return dtype == torch.float32 or (dtype == torch.float64 and device.type != "mps")


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cpu":
        return _cpu_has_bfloat16()
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return getattr(torch.get_device_module(device), "is_bf16_supported", lambda: True)()


def _cpu_has_bfloat16() -> bool:
    """
    Return whether oneDNN, which runs the matrix products, has bfloat16 instructions.

    On ARM oneDNN supports bfloat16 only with these instructions; on x86 it also supports it by widening every operand.
    torch < 2.10 has no public function for either check.
    """
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return True
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    except AttributeError:  # a newer torch without these functions: float32 is correct on every CPU
        return False
