"""Device and compute dtype: choose_device, choose_dtype, and the dtype that `sailvit encode` uses and prints."""

import os
import platform
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import PHOTOGRAPH
from fork_server import run_forked
from safetensors.torch import load_file

import sailvit_cli
from sailvit import SAILViTModel, devices
from sailvit.devices import choose_device, choose_dtype, computes_natively


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch):
    """Return a function that simulates a CPU: architecture, bfloat16 support of oneDNN, instruction sets."""

    def simulate(machine: str, onednn: bool, avx512: bool = False, amx: bool = False) -> None:
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)

    return simulate


@pytest.mark.parametrize(
    ("processor", "native"),
    [
        (("x86_64", True, True), True),
        (("x86_64", True, False, True), True),
        (("AMD64", True, True), True),
        (("x86_64", True), False),  # AVX-512 without bfloat16: oneDNN widens
        (("x86_64", False, True), False),  # limited by ONEDNN_MAX_CPU_ISA
        (("x86_64", False), False),  # AVX2
        (("aarch64", True), True),
        (("aarch64", False), False),
        (("arm64", False), False),
    ],
)
def test_bfloat16_is_native_on_cpus_with_bfloat16_instructions(cpu, processor, native):
    cpu(*processor)
    assert computes_natively(torch.bfloat16, "cpu") is native
    assert computes_natively(torch.float32, "cpu") and not computes_natively(torch.float16, "cpu")
    expected = torch.bfloat16 if native else torch.float32
    assert choose_dtype(torch.bfloat16, "cpu")[0] == expected


def test_float32_is_chosen_if_torch_lacks_the_checks(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert choose_dtype(torch.bfloat16, "cpu")[0] == torch.float32


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="needs Linux on x86")
@pytest.mark.parametrize("limit", ["", "AVX2"])
def test_this_cpu_matches_its_flags(limit, tmp_path):
    script = "import torch; from sailvit.devices import computes_natively as n; print(n(torch.bfloat16, 'cpu'))"
    environment = {key: value for key, value in os.environ.items() if key != "ONEDNN_MAX_CPU_ISA"}
    environment |= {"ONEDNN_MAX_CPU_ISA": limit} if limit else {}
    done = run_forked(script, folder=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    flags = Path("/proc/cpuinfo").read_text().split()
    assert done.stdout.strip() == str(not limit and bool({"avx512_bf16", "amx_bf16"} & set(flags)))


@pytest.mark.parametrize("native", [True, False])
def test_cuda_bfloat16_excludes_emulation(monkeypatch, native):
    devices_used = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: devices_used.append(device) or nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert choose_dtype(torch.bfloat16, "cuda:1")[0] == (torch.bfloat16 if native else torch.float32)
    assert devices_used == [torch.device("cuda:1")] and computes_natively(torch.float16, "cuda")


@pytest.mark.parametrize("new", [True, False])
def test_mps_has_bfloat16_since_macos_14(monkeypatch, new):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) == (14, 0) and new)
    assert computes_natively(torch.bfloat16, "mps") is new
    assert computes_natively(torch.float16, "mps") and not computes_natively(torch.float64, "mps")


@pytest.mark.parametrize("module", [type("xpu", (), {"is_bf16_supported": staticmethod(lambda: False)}), object()])
def test_other_accelerators_report_bfloat16_support(monkeypatch, module):
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert computes_natively(torch.bfloat16, "xpu") is not hasattr(module, "is_bf16_supported")


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_auto_never_lowers_precision(cpu, stored, native):
    cpu("x86_64", native, native)
    dtype, reason = choose_dtype(stored, "cpu")
    assert torch.finfo(dtype).eps <= torch.finfo(stored).eps and dtype != torch.float16
    assert reason == "dtype of the stored weights" if dtype == stored else "not native" in reason


def test_a_requested_dtype_is_used_with_a_note_if_it_is_slow(cpu):
    cpu("x86_64", False)
    assert choose_dtype(torch.float32, "cpu", "bfloat16") == (
        torch.bfloat16,
        "as requested; not native on this cpu, float32 is faster",
    )
    assert choose_dtype(torch.bfloat16, "cpu", torch.float32) == (torch.float32, "as requested")
    for wrong in ("int8", torch.int8, "nn"):
        with pytest.raises(ValueError, match="dtype must be one of auto, float32"):
            choose_dtype(torch.float32, "cpu", wrong)


def test_the_default_device_is_the_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert choose_device() == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert choose_device() == torch.device("mps") and choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'nonsense' cannot be used"):
        choose_device("nonsense")


@pytest.mark.parametrize(
    ("stored", "native", "requested", "computed", "reason"),
    [
        ("bfloat16", True, "auto", torch.bfloat16, "dtype of the stored weights"),
        ("bfloat16", False, "auto", torch.float32, "the weights are bfloat16, which is not native on this cpu"),
        ("float32", True, "auto", torch.float32, "dtype of the stored weights"),
        ("float16", True, "auto", torch.float32, "the weights are float16"),
        ("float32", False, "bfloat16", torch.bfloat16, "as requested; not native on this cpu"),
    ],
)
def test_encode_prints_dtype_and_reason(folder, tmp_path, cpu, capsys, stored, native, requested, computed, reason):
    cpu("x86_64", native, native)
    model = SAILViTModel.from_pretrained(folder, dtype=getattr(torch, stored))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_bytes((folder / "preprocessor_config.json").read_bytes())
    arguments = ["encode", str(PHOTOGRAPH), "--model", str(tmp_path / "model"), "--out", str(tmp_path), "--no-tile"]
    assert sailvit_cli.main([*arguments, "--device", "cpu", "--dtype", requested]) == 0
    assert load_file(tmp_path / "raccoon.jpg.safetensors")["tokens"].dtype == computed
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("runs on cpu in "))
    assert f"{devices.dtype_name(computed)}: {reason}" in line
