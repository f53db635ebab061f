"""
Benchmark of `sailvit serve` against `generate` in the same process: time to first token and tokens per second.

Server and `generate` share a process, and take turns; the OpenAI clients are in a process of their own. Both begin with
a PNG and end with text. With several clients at once the aggregate tokens per second are compared with those of
`generate`, called for one request after the other, as the server does. Processor time is that of the server without the
clients: it is what another load on the machine changes least.

    OMP_NUM_THREADS=1 python benchmarks/serving.py              # the trained miniature, then a wide one
"""

import argparse
import base64
import io
import multiprocessing
import os
import socket
import tempfile
import time
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from timing import print_ratios
from transformers.generation.streamers import BaseStreamer

from sailvit import SAILVLConfig, SAILVLForConditionalGeneration, SAILVLProcessor
from sailvit.examples.miniature.shipped import MULTIMODAL
from sailvit.serve.images import Limits
from sailvit.serve.server import run_server


WIDE = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
QUESTION = "What is it?"  # of a red picture; the miniature answers "red" without end


class Clock(BaseStreamer):
    """Streamer that records the time of the prompt and of every generated token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def make_png(number: int) -> bytes:
    """Return a picture of 4 tiles and a thumbnail; pictures differ in one pixel."""
    picture = Image.new("RGB", (64, 64), "red")
    picture.putpixel((0, 0), (number, 0, 0))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def write_wide_model(folder: Path, layers: int) -> Path:
    """Write the miniature with a language model of Qwen2.5-0.5B's width and random weights, which ends no answer."""
    processor = SAILVLProcessor.from_pretrained(MULTIMODAL)
    small = SAILVLConfig.from_pretrained(MULTIMODAL)
    text = {**small.text_config.to_dict(), **WIDE, "num_hidden_layers": layers, "layer_types": None, "head_dim": 64}
    config = SAILVLConfig(small.vision_config, text, image_token_id=small.image_token_id)
    model = SAILVLForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def start_server(folder: Path) -> str:
    """Start the server in a thread of this process; return its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--non-blocking", "--device", "cpu", "--dtype", "float32", "--log-level", "error"]
    run_server(str(folder), options, Limits())
    address = f"http://127.0.0.1:{port}"
    while True:
        try:
            urllib.request.urlopen(f"{address}/health").close()
            return address
        except OSError:
            time.sleep(0.1)


@cache
def client_of(address: str) -> Any:
    """Return the client of a server, which takes tens of milliseconds to make."""
    import openai

    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def ask(address: str, name: str, png: bytes, tokens: int) -> tuple[float, float, int]:
    """Return the seconds to the first piece of a streamed answer and to its end, and its tokens."""
    client = client_of(address)
    url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    first, started = None, time.perf_counter()
    for event in client.chat.completions.create(model=name, messages=messages, max_tokens=tokens, stream=True):
        if event.choices[0].delta.content and first is None:
            first = time.perf_counter() - started
    return first, time.perf_counter() - started, event.usage.completion_tokens


def ask_at_once(
    address: str, name: str, pngs: list[bytes], tokens: int
) -> tuple[float, list[tuple[float, float, int]]]:
    """Return the seconds until all clients have their answers, and what `ask` returns for each."""
    started = time.perf_counter()
    with ThreadPoolExecutor(len(pngs)) as pool:
        answers = [*pool.map(lambda png: ask(address, name, png, tokens), pngs)]
    return time.perf_counter() - started, answers


@torch.inference_mode()
def generate(model: Any, processor: Any, png: bytes, tokens: int) -> tuple[float, float, int]:
    """Return the same as `ask`, of the processor and `generate`."""
    clock, started = Clock(), time.perf_counter()
    content = [{"type": "image", "image": Image.open(io.BytesIO(png))}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    output = model.generate(**inputs, max_new_tokens=tokens, streamer=clock)
    processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return clock.times[1] - started, time.perf_counter() - started, len(clock.times) - 1


def compare(folder: Path, clients: Any, options: argparse.Namespace) -> dict[str, float]:
    """Return the speed of the server with 1 client and with several, `generate` = 1."""
    address, tokens = start_server(folder), options.tokens
    model = SAILVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = SAILVLProcessor.from_pretrained(folder)
    pngs = [make_png(number) for number in range(options.clients)]
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"server": [], "generate": []})
    for is_warm in [False, *[True] * options.rounds]:
        cpu = {"server": -time.process_time()}
        one = {"server": clients.apply(ask, (address, folder.name, pngs[0], tokens))}
        cpu = {"server": cpu["server"] + time.process_time(), "generate": -time.process_time()}
        one["generate"] = generate(model, processor, pngs[0], tokens)
        cpu["generate"] += time.process_time()
        whole, answers = clients.apply(ask_at_once, (address, folder.name, pngs, tokens))
        started = time.perf_counter()
        others = [generate(model, processor, png, tokens) for png in pngs]
        several = {"server": whole, "generate": time.perf_counter() - started}
        assert {count for _, _, count in [*one.values(), *answers, *others]} == {tokens}
        for name in one if is_warm else ():
            first, last, _ = one[name]
            seconds["time to first token, 1 client"][name].append(first)
            seconds["tokens per second after it, 1 client"][name].append((last - first) / (tokens - 1))
            seconds["processor time of this process per token, 1 client"][name].append(cpu[name] / tokens)
            seconds[f"tokens per second, {len(pngs)} clients together"][name].append(several[name] / tokens / len(pngs))
    for what, found in seconds.items():
        print(f"{what}: {', '.join(f'{name} {median(values) * 1e3:.2f} ms' for name, values in found.items())}")
    return {what: median(found["generate"]) / median(found["server"]) for what, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (64)")
    parser.add_argument("--layers", type=int, default=4, help="of the wide language model (4)")
    parser.add_argument("--only", choices=("miniature", "wide"))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as scratch, multiprocessing.get_context("spawn").Pool(1) as clients:
        if options.only != "wide":
            print_ratios("the miniature: speed, generate = 1", compare(MULTIMODAL, clients, options))
        if options.only != "miniature":
            folder = write_wide_model(Path(scratch) / "wide", options.layers)
            title = f"{options.layers} layers of width 896: speed, generate = 1"
            print_ratios(title, compare(folder, clients, options))
    os._exit(0)  # the servers' threads have no end


if __name__ == "__main__":
    main()
