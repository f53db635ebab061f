"""
Benchmark of SAIL-VL `generate` against manual calls of its components: time to first token and tokens per second.

Interleaved in one process. With --peak: peak memory of many tiles above one micro-batch, each in its own process.

    python benchmarks/multimodal.py                   # 4 blocks of Large, 4 layers of Qwen2.5-0.5B's width
    python benchmarks/multimodal.py --peak            # memory
"""

import argparse
import math
import os
import sys
import time
from collections import defaultdict
from statistics import median
from typing import Any

import torch
from einops import rearrange
from processes import measure
from timing import print_ratios, synchronize
from transformers.generation.streamers import BaseStreamer

from sailvit import SAILViTConfig, SAILVLConfig, SAILVLForConditionalGeneration
from sailvit.devices import DTYPES, choose_dtype, dtype_name


TILES = 9  # eight tiles and a thumbnail
QWEN = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip


def make_model(options: argparse.Namespace) -> SAILVLForConditionalGeneration:
    vision = SAILViTConfig.from_size("large", num_hidden_layers=options.blocks)
    config = SAILVLConfig(vision, {**QWEN, "num_hidden_layers": options.layers}, vision_batch_size=8)
    dtype, reason = choose_dtype(torch.bfloat16, options.device, options.dtype)
    print(f"{dtype_name(dtype)}: {reason}")
    return SAILVLForConditionalGeneration(config).to(options.device, dtype).eval()


def make_prompts(model: SAILVLForConditionalGeneration, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (batch, S) of 40 text tokens and one image of TILES tiles per prompt, and all tiles."""
    size, num_visual = model.config.vision_config.image_size, TILES * model.config.image_seq_length
    text = torch.randint(0, model.config.image_token_id, (batch, 40))
    ids = torch.cat([text[:, :20], torch.full((batch, num_visual), model.config.image_token_id), text[:, 20:]], 1)
    return ids.to(model.device), torch.randn(batch * TILES, 3, size, size, dtype=model.dtype, device=model.device)


def generate_manually(
    model: SAILVLForConditionalGeneration, ids: torch.Tensor, pixels: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Call vision encoder and connector, then `generate` of the language model."""
    patches = model.vision_model(pixels).last_hidden_state
    side = math.isqrt(model.config.image_seq_length)
    shuffled = rearrange(patches, "b (h p w q) c -> b (h w) (p q c)", h=side, w=side, p=2, q=2)
    embeds = model.language_model.get_input_embeddings()(ids)
    embeds[ids == model.config.image_token_id] = model.mlp1(shuffled).flatten(0, 1)
    return model.language_model.generate(inputs_embeds=embeds, **options)


def generate(
    model: SAILVLForConditionalGeneration, ids: torch.Tensor, pixels: torch.Tensor, **options: Any
) -> torch.Tensor:
    return model.generate(ids, pixel_values=pixels, **options)[:, ids.shape[1] :]


class Clock(BaseStreamer):
    """Streamer that records the time of the prompt and of every generated token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        synchronize()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def compare(options: argparse.Namespace, model: SAILVLForConditionalGeneration, batch: int) -> dict[str, float]:
    """Print and return seconds to the first token and tokens per second after it, and their ratios to manual calls."""
    ids, pixels = make_prompts(model, batch)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1 + options.tokens, "do_sample": False,
                "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    first, rest, outputs = defaultdict(list), defaultdict(list), {}
    for is_warm in [False, *[True] * options.rounds]:
        for name, run in (("manual", generate_manually), ("ours", generate)):
            clock, started = Clock(), time.perf_counter()
            outputs[name] = run(model, ids, pixels, streamer=clock, **settings)
            _, token, *_, last = clock.times
            if is_warm:
                first[name].append(token - started)
                rest[name].append(last - token)
    seconds = {name: (median(first[name]), median(rest[name])) for name in first}
    print(f"same tokens: {torch.equal(*outputs.values())}; {seconds['ours'][0]:.2f} s to the first token, ", end="")
    rate = batch * options.tokens / seconds["ours"][1]
    print(f"{rate:.1f} tokens per second after it")
    manual, ours = seconds["manual"], seconds["ours"]
    ratios = {"to the first token": manual[0] / ours[0], "tokens per second": manual[1] / ours[1]}
    print_ratios(f"{batch} prompts of {TILES} tiles: speed, manual calls = 1", ratios)
    figures = {"seconds to the first token": ours[0], "tokens per second": rate}
    return figures | {f"{name}, manual calls = 1": ratio for name, ratio in ratios.items()}


def peak(options: argparse.Namespace) -> None:
    """Compare the peak memory of a process that encodes one micro-batch and one that encodes all tiles."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "100000"  # freed memory is returned to the system at once
    command = [sys.executable, __file__, "--blocks", options.blocks, "--encode"]
    batch, all_tiles = (measure(*command, tiles)[1] / 1e6 for tiles in (8, 64))
    output = 64 * 256 * QWEN["hidden_size"] * 2 / 1e6
    print(f"64 tiles: {all_tiles - batch:.0f} MB above a micro-batch of 8; the output is {output:.0f} MB")
    print(f"(64 at once: {measure(*command, 64, '--at-once')[1] / 1e6 - batch:.0f} MB above)")


def encode(options: argparse.Namespace) -> None:
    torch.set_default_dtype(torch.bfloat16)  # creating the model in float32 would be the peak
    vision = SAILViTConfig.from_size("large", num_hidden_layers=options.blocks)
    text = {**QWEN, "vocab_size": 1024, "num_hidden_layers": 1}
    config = SAILVLConfig(vision, text, vision_batch_size=64 if options.at_once else 8)
    model = SAILVLForConditionalGeneration(config).to(options.device).eval()
    size = model.config.vision_config.image_size
    pixels = torch.zeros(64, 3, size, size, dtype=torch.bfloat16, device=options.device) + 0.5
    model.get_image_features(pixels[: options.encode])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the vision encoder (4)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the language model (4)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", action="store_true", help="measure memory")
    parser.add_argument("--encode", type=int, metavar="TILES", help="encode this many of 64 tiles (used by --peak)")
    parser.add_argument("--at-once", action="store_true", help="with --encode: no micro-batches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.peak:
        peak(options)
    elif options.encode:
        encode(options)
    else:
        print(
            f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
        )
        model = make_model(options)
        for batch in options.batch:
            compare(options, model, batch)


if __name__ == "__main__":
    with torch.no_grad():
        main()
