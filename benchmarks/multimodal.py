"""
SAIL-VL against the same parts put together by hand: time to the first token and tokens a second, interleaved in one
process; and the peak memory of many tiles above that of one micro-batch, each in a process of its own.

    python benchmarks/multimodal.py                   # 4 blocks of Large before 4 layers of Qwen2.5-0.5B's width
    python benchmarks/multimodal.py --peak            # memory
"""

import argparse
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


TILES = 9  # eight and a thumbnail
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
    """Ids (batch, S) of forty words around one image of TILES tiles each, and the tiles of all."""
    size, image = model.config.vision_config.image_size, TILES * model.config.image_seq_length
    words = torch.randint(0, 150_000, (batch, 40))
    ids = torch.cat([words[:, :20], torch.full((batch, image), model.config.image_token_id), words[:, 20:]], 1)
    return ids.to(model.device), torch.randn(batch * TILES, 3, size, size, dtype=model.dtype, device=model.device)


def generate_by_hand(
    model: SAILVLForConditionalGeneration, ids: torch.Tensor, pixels: torch.Tensor, **options: Any
) -> torch.Tensor:
    """The parts called one after the other, and the language model's own `generate`."""
    patches = model.vision_model(pixels).last_hidden_state
    folded = rearrange(patches, "b (h p w q) c -> b (h w) (p q c)", h=16, w=16, p=2, q=2)
    embeds = model.language_model.get_input_embeddings()(ids)
    embeds[ids == model.config.image_token_id] = model.mlp1(folded).flatten(0, 1)
    return model.language_model.generate(inputs_embeds=embeds, **options)


def generate(
    model: SAILVLForConditionalGeneration, ids: torch.Tensor, pixels: torch.Tensor, **options: Any
) -> torch.Tensor:
    return model.generate(ids, pixel_values=pixels, **options)[:, ids.shape[1] :]


class Clock(BaseStreamer):
    """When the prompt was taken in, and when each token came out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        synchronize()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def compare(options: argparse.Namespace, model: SAILVLForConditionalGeneration, batch: int) -> None:
    ids, pixels = make_prompts(model, batch)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1 + options.tokens, "do_sample": False,
                "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    first, rest, written = defaultdict(list), defaultdict(list), {}
    for counted in [False, *[True] * options.rounds]:
        for name, run in (("by hand", generate_by_hand), ("ours", generate)):
            clock, started = Clock(), time.perf_counter()
            written[name] = run(model, ids, pixels, streamer=clock, **settings)
            _, token, *_, last = clock.times
            if counted:
                first[name].append(token - started)
                rest[name].append(last - token)
    seconds = {name: (median(first[name]), median(rest[name])) for name in first}
    print(f"same tokens: {torch.equal(*written.values())}; {seconds['ours'][0]:.2f} s to the first token, ", end="")
    print(f"{batch * options.tokens / seconds['ours'][1]:.1f} a second after it")
    hand, ours = seconds["by hand"], seconds["ours"]
    ratios = {"to the first token": hand[0] / ours[0], "tokens a second": hand[1] / ours[1]}
    print_ratios(f"{batch} prompts of {TILES} tiles: speed, by hand = 1", ratios)


def peak(options: argparse.Namespace) -> None:
    """One process encodes one micro-batch of the tiles, another all of them; each returns what it frees at once."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "100000"
    own = [sys.executable, __file__, "--blocks", options.blocks, "--encode"]
    batch, all_tiles = (measure(*own, tiles)[1] / 1e6 for tiles in (8, 64))
    output = 64 * 256 * QWEN["hidden_size"] * 2 / 1e6
    print(
        f"64 tiles: {all_tiles - batch:.0f} MB above 8 of them, which are a micro-batch; the output is {output:.0f} MB"
    )
    print(f"(64 at once: {measure(*own, 64, '--at-once')[1] / 1e6 - batch:.0f} MB above)")


def encode(options: argparse.Namespace) -> None:
    torch.set_default_dtype(torch.bfloat16)  # a model made in float32 first would be the peak
    vision = SAILViTConfig.from_size("large", num_hidden_layers=options.blocks)
    text = {**QWEN, "vocab_size": 1024, "num_hidden_layers": 1}
    config = SAILVLConfig(vision, text, vision_batch_size=64 if options.at_once else 8)
    model = SAILVLForConditionalGeneration(config).to(options.device).eval()
    size = model.config.vision_config.image_size
    pixels = torch.zeros(64, 3, size, size, dtype=torch.bfloat16, device=options.device) + 0.5
    model.get_image_features(pixels[: options.encode])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4, help="of the tower")
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", action="store_true", help="measure memory")
    parser.add_argument("--encode", type=int, metavar="TILES", help="what --peak measures: so many of 64 tiles")
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
