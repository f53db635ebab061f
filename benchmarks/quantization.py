"""
Benchmark of quantized SAIL-VL against the same model without: answers of the miniature, bytes of the weights, speed.

Contenders are interleaved in one process.

    python benchmarks/quantization.py answers         # the trained miniature: right answers, agreement of captions
    python benchmarks/quantization.py speed           # random weights: Qwen2.5-0.5B with 2 blocks of Large

On a CPU the times are those of the processor, so that other work does not count: OMP_NUM_THREADS=1.
"""

import argparse
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from multimodal import QWEN
from timing import medians, print_ratios
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from sailvit import SAILViTConfig, SAILVLConfig, SAILVLForConditionalGeneration
from sailvit.devices import DTYPES, choose_dtype, dtype_name
from sailvit.examples.miniature.answers import Answerer, Asked, read_questions
from sailvit.examples.miniature.shipped import MULTIMODAL
from sailvit.examples.miniature.world import WorldPlan, list_outputs
from sailvit.modeling_sailvl import UNQUANTIZED


BLOCK = 64  # weights of a block in 4 bits, the default of bitsandbytes
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
INT4 = {"weight_dtype": torch.int4, "granularity": PerGroup(16)}  # 16 divides all widths of the miniature
# Name -> settings, given the modules to skip; None for the default. The int4 of torchao that CPUs compute takes 8 bits.
METHODS: dict[str, Callable[[list[str] | None], Any]] = {
    "bitsandbytes 8 bit": lambda skip: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip),
    "bitsandbytes 4 bit, nf4": lambda skip: BitsAndBytesConfig(**NF4, llm_int8_skip_modules=skip),
    "torchao int8": lambda skip: TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skip),
    "torchao int4": lambda skip: TorchAoConfig(IntxWeightOnlyConfig(**INT4), modules_to_not_convert=skip),
}
# Components that are quantized -> the modules to skip.
COMPONENTS: dict[str, list[str] | None] = {
    "language": list(UNQUANTIZED),
    "vision, connector": ["language_model"],
    "all three": ["language_model.lm_head"],
}
CAPTION = "Describe the picture in detail."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["answers", "speed"])
    parser.add_argument("--questions", type=int, default=500, help="of each category (answers)")
    parser.add_argument("--layers", type=int, default=24, help="of the language model (speed)")
    parser.add_argument("--blocks", type=int, default=2, help="of the vision encoder (speed)")
    parser.add_argument("--tokens", type=int, default=16, help="generated after the first one (speed)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    options = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        (compare_answers if options.part == "answers" else compare_speed)(Path(folder), options)


# Answers


def compare_answers(folder: Path, options: argparse.Namespace) -> None:
    """Print right answers, and the agreement of captions with the unquantized model's, by method and components."""
    asked = draw_questions(folder, options.questions)
    answerer = Answerer(MULTIMODAL)
    right, captions = ask(answerer, asked)
    print(f"{'unquantized':45} {show(right)}")
    for method, settings in METHODS.items():
        for components, skip in COMPONENTS.items():
            if "4 bit" in method:
                answerer.model = round_to_4_bits(SAILVLForConditionalGeneration.from_pretrained(MULTIMODAL), skip)
            else:
                answerer.model = load(MULTIMODAL, settings(skip), torch.float32, options.device)
            right, other = ask(answerer, asked)
            words = f"words as unquantized {agreement(captions, other):.3f}"
            print(f"{f'{method}: {components}':45} {show(right)}, {words}")


def round_to_4_bits(model: SAILVLForConditionalGeneration, skip: list[str]) -> SAILVLForConditionalGeneration:
    """
    Replace weights by what bitsandbytes' 4 bits make of them.

    On a CPU bitsandbytes dequantizes rows wrongly that are no whole blocks, as the miniature's; given as rows of one
    block, the same blocks are right.
    """
    quantize = functools.partial(quantize_4bit, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith(tuple(skip)):
            blocks = module.weight.data.reshape(-1, BLOCK)
            module.weight.data = dequantize_4bit(*quantize(blocks)).view_as(module.weight)
    return model.eval()


def draw_questions(folder: Path, most: int) -> dict[str, list[Asked]]:
    """Return up to `most` questions of each category about pictures that training never showed."""
    plan = dataclasses.replace(WorldPlan(), tests=most)
    output = next(output for output in list_outputs(plan) if output.path == "test/seen/scenes.parquet")
    for _ in output.write(folder / "scenes.parquet"):
        pass
    return read_questions(folder, most)


def ask(answerer: Answerer, asked: dict[str, list[Asked]]) -> tuple[dict[str, float], list[str]]:
    """Return the share of right answers of each category, and the captions of the pictures of the first one."""
    right = {}
    for category, questions in asked.items():
        answers = answerer.answer([one.question.user for one in questions], [one.picture for one in questions])
        expected = [one.question.assistant for one in questions]
        right[category] = sum(map(str.__eq__, answers, expected)) / len(expected)
    pictures = [one.picture for one in next(iter(asked.values()))]
    return right, answerer.answer([CAPTION] * len(pictures), pictures)


def show(right: dict[str, float]) -> str:
    return ", ".join(f"{category} {share:.3f}" for category, share in right.items())


def agreement(expected: list[str], found: list[str]) -> float:
    """Return the share of words before the first difference: what follows it has another context."""
    same = total = 0
    for one, other in zip(map(str.split, expected), map(str.split, found), strict=True):
        differences = [index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]]
        same += min([*differences, len(one), len(other)])
        total += len(one)
    return same / total


# Speed


def compare_speed(folder: Path, options: argparse.Namespace) -> None:
    """Print bytes of the weights, and speed of the prompt and of the tokens after the first one."""
    vision = SAILViTConfig.from_size("large", num_hidden_layers=options.blocks)
    config = SAILVLConfig(vision, {**QWEN, "num_hidden_layers": options.layers})
    dtype, reason = choose_dtype(torch.bfloat16, options.device, options.dtype)
    print(f"{dtype_name(dtype)}: {reason}")
    models = {"unquantized": SAILVLForConditionalGeneration(config).to(dtype).eval()}
    sizes = {"unquantized": save_size(models["unquantized"], source := folder / "source")}
    for method, settings in METHODS.items():
        models[method] = load(source, settings(None), dtype, options.device)
        sizes[method] = save_size(models[method], folder / "quantized")
    models["unquantized"].to(options.device)
    print_sizes(sizes)
    time_models(models, options)
    models |= {name: load(source, METHODS[name](["language_model"]), dtype, options.device) for name in METHODS}
    time_vision(models, options)


def print_sizes(sizes: dict[str, int]) -> None:
    whole = sizes["unquantized"]
    print_ratios("Bytes of the weights, unquantized = 1", {name: size / whole for name, size in sizes.items()})
    print(f"unquantized: {whole:,} bytes")


@torch.inference_mode()
def time_models(models: dict[str, SAILVLForConditionalGeneration], options: argparse.Namespace) -> None:
    ids, pixels = make_prompt(models["unquantized"])

    def generate(model: SAILVLForConditionalGeneration, tokens: int) -> Callable[[], object]:
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
        return lambda: model.generate(ids, pixel_values=pixels, **settings)

    lengths = {"prompt": 1, "all": 1 + options.tokens}
    candidates = {
        f"{name}/{what}": generate(model, tokens) for name, model in models.items() for what, tokens in lengths.items()
    }
    seconds = medians(candidates, options.rounds, clock_of(options.device))
    first = {name: seconds[f"{name}/prompt"] for name in models}
    later = {name: seconds[f"{name}/all"] - first[name] for name in models}
    for title, times in (("Time to the first token", first), (f"Time of {options.tokens} more tokens", later)):
        print_ratios(f"{title}, unquantized = 1", {name: times[name] / times["unquantized"] for name in models})


@torch.inference_mode()
def time_vision(models: dict[str, SAILVLForConditionalGeneration], options: argparse.Namespace) -> None:
    """Print the speed of quantized vision encoders and connectors."""
    _, pixels = make_prompt(models["unquantized"])
    candidates = {name: functools.partial(model.get_image_features, pixels) for name, model in models.items()}
    seconds = medians(candidates, options.rounds, clock_of(options.device))
    ratios = {name: value / seconds["unquantized"] for name, value in seconds.items()}
    print_ratios("Time of vision encoder and connector if they are quantized, unquantized = 1", ratios)


def clock_of(device: str) -> Callable[[], float]:
    """Return the processor's time on a CPU, where other work on the machine would count."""
    return time.process_time if device == "cpu" else time.perf_counter


def make_prompt(model: SAILVLForConditionalGeneration) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (1, S) of 40 text tokens and one tile, and the tile."""
    image, size = model.config.image_token_id, model.config.vision_config.image_size
    text = torch.randint(0, image, (1, 40))
    ids = torch.cat([text[:, :20], torch.full((1, model.config.image_seq_length), image), text[:, 20:]], 1)
    return ids.to(model.device), torch.randn(1, 3, size, size, device=model.device)


def load(source: str | Path, quantization: Any, dtype: torch.dtype, device: str) -> SAILVLForConditionalGeneration:
    options = {"dtype": dtype, "quantization_config": quantization, "device_map": {"": device}}
    return SAILVLForConditionalGeneration.from_pretrained(source, **options).eval()


def save_size(model: SAILVLForConditionalGeneration, folder: Path) -> int:
    """Return the bytes of the weights as `save_pretrained` writes them, about as many as in memory."""
    model.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
