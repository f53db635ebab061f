# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The device that a model runs on, and the dtype that it computes in there.

The dtype of stored weights says how they were kept, not what a device is good at: a processor without bfloat16 units
takes four times as long in bfloat16 as in float32. Every command that runs a model asks `choose_dtype`.
"""

import platform

import torch


DTYPES = ("auto", "float32", "bfloat16", "float16")


def choose_device(asked: str | torch.device | None = None) -> torch.device:
    """
    Return the device asked for; without one, a GPU if there is one, else the CPU.

    Raises:
        ValueError: There is no such device, or it cannot be used.
    """
    if asked is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=asked).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(asked)!r} cannot be used: {str(error).splitlines()[0]}") from error


def choose_dtype(
    stored: torch.dtype, device: str | torch.device, asked: str | torch.dtype = "auto"
) -> tuple[torch.dtype, str]:
    """
    Return the dtype to compute in, and the reason for it in a few words.

    Args:
        stored: Of the weights. "auto" keeps it where the device computes in it natively, and takes float32 elsewhere:
            precision is never lowered unasked.
        device: That the model is to run on.
        asked: "auto", or a dtype or its name, which is returned whatever the device is good at.

    Raises:
        ValueError: `asked` is no dtype of floats.
    """
    device = torch.device(device)
    if asked != "auto":
        dtype = getattr(torch, asked, None) if isinstance(asked, str) else asked
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {asked!r}")
        slow = f"; this {device.type} lacks units for it, float32 is faster"
        return dtype, "as asked" + ("" if computes_natively(dtype, device) else slow)
    if computes_natively(stored, device):
        return stored, "as the weights are stored"
    return torch.float32, f"the weights are {dtype_name(stored)}, for which this {device.type} lacks units"


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def computes_natively(dtype: torch.dtype, device: str | torch.device) -> bool:
    """Return whether a device has units for a dtype, rather than converting every operand to another one."""
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
    """Whether oneDNN, which multiplies matrices here, has instructions for it. It takes bfloat16 on ARM only with them,
    but on x86 also where it has to widen each operand. torch < 2.10 has no public name for either question."""
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return True
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    except AttributeError:  # a later torch: float32 is right on every processor
        return False
