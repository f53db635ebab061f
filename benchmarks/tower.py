"""
Benchmark of the forward pass of SAILViT against transformers' Aimv2VisionModel and timm.

Same weights, interleaved in one process.

    python benchmarks/tower.py                       # Large, 1 and 8 tiles: eager, then 6 blocks compiled
    python benchmarks/tower.py --compiled-blocks 0   # eager only
    python benchmarks/tower.py --dtype bfloat16      # default: bfloat16 if native, else float32

Compiled: torch.compile, on a CPU also with weight freezing by inductor.
"""

import argparse
import os
import time
from collections.abc import Callable

import torch
import torch._inductor.config as inductor
from timing import medians, print_ratios
from torch.nn import functional as F
from twins import native_twin, timm_tokens, timm_twin

from sailvit import SAILViTConfig, SAILViTModel
from sailvit.devices import DTYPES, choose_device, choose_dtype, dtype_name


def forwards(tower: SAILViTModel) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return the three models as functions of pixel_values."""
    native, timm_model = native_twin(tower).to(tower.device), timm_twin(tower).to(tower.device)
    return {
        "native": lambda pixels: native(pixels).last_hidden_state,
        "timm": lambda pixels: timm_tokens(timm_model, pixels),
        "ours": lambda pixels: tower(pixels).last_hidden_state,
    }


def compiled(functions: dict[str, Callable], pixels: torch.Tensor, freezing: bool) -> dict[str, Callable]:
    """Compile every function and run it once on `pixels`."""
    ready = {}
    with inductor.patch(freezing=freezing):
        for name, function in functions.items():
            torch._dynamo.reset()
            ready[name] = torch.compile(function, dynamic=False)
            started = time.perf_counter()
            ready[name](pixels)
            print(f"compiled {name} in {time.perf_counter() - started:.0f} s, freezing={freezing}", flush=True)
    return ready


def product_rate(
    device: str, dtype: torch.dtype, rows: int = 8192, width: int = 1024, out: int = 2816, repeats: int = 1
) -> float:
    """
    Measure the FLOP/s of a matrix product; default: the largest of a block, 1,024 tokens, width 1,024 to 2,816.

    Args:
        repeats: Products of a measurement, so that the start of a GPU's kernel does not count.
    """
    tokens, weight = (torch.randn(*shape, dtype=dtype, device=device) for shape in ((rows, width), (out, width)))

    def multiply() -> None:
        for _ in range(repeats):
            F.linear(tokens, weight)

    return 2 * repeats * rows * width * out / medians({"product": multiply}, 10)["product"]


def flops(config: SAILViTConfig, tiles: int) -> float:
    """Return the FLOPs of a forward pass."""
    tokens, width = config.grid_size**2, config.hidden_size
    block = 4 * width * width + 3 * width * config.intermediate_size + 2 * tokens * width
    return 2 * tiles * tokens * (config.num_hidden_layers * block + config.num_channels * config.patch_size**2 * width)


def compare(options: argparse.Namespace, tower: SAILViTModel, tiles: int, compile: bool) -> dict[str, float]:
    """Print the seconds, the speed of all models relative to native, and ours relative to timm; return the seconds."""
    size = tower.config.image_size
    pixels = torch.randn(tiles, 3, size, size, device=options.device, dtype=tower.dtype)
    functions = forwards(tower)
    candidates = {f"{name} eager": function for name, function in functions.items()}
    if compile:
        for freezing in (False, True) if torch.device(options.device).type == "cpu" else (False,):
            ready = compiled(functions, pixels, freezing)
            candidates |= {f"{name} compiled{', frozen' if freezing else ''}": run for name, run in ready.items()}
    seconds = medians({name: lambda run=run: run(pixels) for name, run in candidates.items()}, options.rounds)
    rate = product_rate(options.device, tower.dtype)
    for name, value in seconds.items():
        share = flops(tower.config, tiles) / value / rate
        print(f"{value:9.4f} s  {share:6.1%} of the FLOP/s of its matrix products  {name}")
    depth, dtype = tower.config.num_hidden_layers, dtype_name(tower.dtype)
    title = f"{tiles} tile(s), {options.size}, {depth} blocks, {dtype}: speed"
    against_native = {name: seconds["native eager"] / value for name, value in seconds.items()}
    print_ratios(f"{title}, native eager = 1", against_native)
    modes = [name.removeprefix("ours ") for name in seconds if name.startswith("ours ")]
    against_timm = {f"ours {mode}": seconds[f"timm {mode}"] / seconds[f"ours {mode}"] for mode in modes}
    print_ratios(f"{title}, timm in the same mode = 1", against_timm)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="large")
    parser.add_argument("--blocks", type=int, default=24, help="blocks of the eager models (24)")
    parser.add_argument("--compiled-blocks", type=int, default=6, help="blocks of the compiled models (6); 0: none")
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", type=choose_device, default=choose_device())
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    dtype, reason = choose_dtype(torch.bfloat16, options.device, options.dtype)
    print(f"{dtype_name(dtype)}: {reason}")
    for blocks, compile in ((options.blocks, False), (options.compiled_blocks, True)):
        if blocks:
            config = SAILViTConfig.from_size(options.size, num_hidden_layers=blocks)
            tower = SAILViTModel(config).to(options.device, dtype).eval()
            for tiles in options.tiles:
                compare(options, tower, tiles, compile)


if __name__ == "__main__":
    with torch.no_grad():
        main()
