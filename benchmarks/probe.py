"""
Benchmark of the probe: extraction against the bare encoder, heads trained together against one, and its accuracies
against scikit-learn's.

On scikit-learn's digits as PNG files, and on crops of the example photograph; random encoders of this package,
transformers and timm.

    python benchmarks/probe.py [accuracy heads extraction] [--images 48]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from timing import medians, print_ratios

from sailvit import SAILViTConfig, SAILViTImageProcessor, SAILViTModel
from sailvit.evaluate.datasets import load_images
from sailvit.evaluate.encoders import Encoder, load_encoder
from sailvit.evaluate.probe.features import compute_features, extract_features, read_features
from sailvit.evaluate.probe.heads import HeadOptions, LogisticRegressions, MLPs, fit_heads


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from toy_images import write_clip, write_digits, write_dinov2, write_timm  # noqa: E402


TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
HEADS = 40
ROUNDS = 5


def write_photographs(folder: Path, count: int) -> None:
    """Write crops of the example photograph as JPEG files of 400 x 300 pixels, in two classes."""
    photograph = Image.open(ROOT / "examples" / "raccoon.jpg").convert("RGB").resize((1024, 768))
    for index in range(count):
        file = folder / str(index % 2) / f"{index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        left, top = 13 * index % 600, 7 * index % 450
        photograph.crop((left, top, left + 400, top + 300)).save(file)


def write_encoder(folder: Path, size: int, **dimensions: int) -> Path:
    torch.manual_seed(0)
    SAILViTModel(SAILViTConfig(image_size=size, **dimensions)).save_pretrained(folder)
    SAILViTImageProcessor(size=size).save_pretrained(folder)
    return folder


def measure_extraction(folder: Path, count: int) -> None:
    write_photographs(folder / "photographs", count)
    model = write_encoder(
        folder / "small", 224, hidden_size=384, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=6
    )
    encoder, images = load_encoder(str(model)), load_images(str(folder / "photographs"), training=False)
    group = images.groups[0]
    tiles = torch.stack([encoder.preprocessing(Image.open(path).convert("RGB")) for path in group.images])
    caches: Iterator[Path] = (folder / f"cache-{index}" for index in range(10**6))

    @torch.inference_mode()
    def run_bare() -> None:
        for batch in tiles.split(16):
            encoder.model(pixel_values=batch)

    seconds = medians(
        {
            "bare": run_bare,
            "extraction, in one process": lambda: extract_features(encoder, images, next(caches), 16),
            "extraction, a loader process": lambda: extract_features(encoder, images, next(caches), 16, workers=1),
        },
        ROUNDS,
    )
    bare = seconds.pop("bare")
    ratios = {name: bare / value for name, value in seconds.items()}
    print_ratios(
        "images per second; the bare encoder on the same tiles = 1 (12 blocks of width 384, 224 pixels)", ratios
    )


def extract(encoder: Encoder, data: Path, cache: Path) -> tuple[torch.Tensor, torch.Tensor]:
    images = load_images(str(data), training=False)
    extract_features(encoder, images, cache)
    return read_features(encoder, images, cache).layer(0), torch.tensor(images.labels)


def compare_accuracies(folder: Path) -> None:
    """Print accuracies on all digits, also without a cache and by scikit-learn."""
    digits, cache = write_digits(folder / "digits", 1200, 597), folder / "cache"
    encoders = {
        "ours": write_encoder(folder / "ours", 56, **TINY),
        "dinov2 of transformers": write_dinov2(folder / "dinov2"),
        "clip of transformers": write_clip(folder / "clip"),
        "test_vit of timm": write_timm(folder / "timm"),
    }
    print(f"\naccuracy on {597} digits: mlp, knn, linear | scikit-learn's LogisticRegression | linear, without a cache")
    for name, path in encoders.items():
        encoder = load_encoder(str(path))
        train, labels = extract(encoder, digits / "train", cache)
        test, truth = extract(encoder, digits / "test", cache)
        heads = {kind: fit_heads(kind, train[None], labels, 10)[0] for kind in ("mlp", "knn", "linear")}
        right = {kind: (head.predict(test, None) == truth).double().mean().item() for kind, head in heads.items()}
        scaler = StandardScaler().fit(train)
        theirs = LogisticRegression(C=heads["linear"].chosen["strength"], max_iter=10_000)
        theirs.fit(scaler.transform(train), labels)
        expected = theirs.score(scaler.transform(test), truth)
        fresh = [
            compute_features(encoder, load_images(str(digits / split), False)).layer(0) for split in ("train", "test")
        ]
        head = fit_heads("linear", fresh[0][None], labels, 10)[0]
        uncached = (head.predict(fresh[1], None) == truth).double().mean().item()
        shown = " ".join(f"{value:.2%}" for value in right.values())
        print(f"  {name:<24}{shown} | {expected:.2%} | {uncached:.2%}")


def processor_seconds(train: Callable[[list], object], candidates: list) -> float:
    """Return the processor time of a training, which other work on the machine changes little."""
    started = time.process_time()
    train(candidates)
    return time.process_time() - started


def measure_heads(folder: Path) -> None:
    """Print what HEADS heads cost when they train together, and whether they classify as each alone does."""
    digits = write_digits(folder / "digits", 1200, 0)
    encoder = load_encoder(str(write_encoder(folder / "ours", 56, **TINY)))
    features, labels = extract(encoder, digits / "train", folder / "cache")
    features, every, options = features[None], torch.arange(len(labels)), HeadOptions(epochs=2)
    rates = [10 ** (-4 + 2 * index / 7) for index in range(8)]
    grid = [(rate, decay) for rate in rates for decay in (0.0, 0.01, 0.1, 0.3, 1.0)]
    strengths = [10 ** (-3 + index / 8) for index in range(HEADS)]

    def mlps(chosen: list[tuple[float, float]]) -> MLPs:
        heads = MLPs(features, 10, chosen, options)
        heads.train(features, labels, every)
        return heads

    def regressions(chosen: list[float]) -> LogisticRegressions:
        heads = LogisticRegressions(features, 10, chosen, every)
        heads.solve(features, labels, every, 200)
        return heads

    cases = {"mlp": (mlps, grid), "linear": (regressions, strengths)}
    for kind, (fit, candidates) in cases.items():
        one = min(processor_seconds(fit, candidates[20:21]) for _ in range(ROUNDS))
        together = min(processor_seconds(fit, candidates) for _ in range(ROUNDS))
        started = time.process_time()
        alone = [fit([candidate]) for candidate in candidates]
        each = time.process_time() - started
        predicted = torch.cat([heads.classify(features)[0] for heads in alone])
        equal = ((fit(candidates).classify(features)[0] == labels).sum(1) == (predicted == labels).sum(1)).sum()
        batch = options.batch_of(len(labels))
        print_ratios(
            f"processor time to train {HEADS} {kind} heads on {features.shape[1]} x {features.shape[2]} features, "
            f"batch {batch}; one head = 1",
            {"together": together / one, "one after the other": each / one},
        )
        print(f"        {equal} of {HEADS} have the accuracy of the same head alone, to the last sample")


PARTS = {
    "accuracy": lambda folder, options: compare_accuracies(folder),
    "heads": lambda folder, options: measure_heads(folder),
    "extraction": lambda folder, options: measure_extraction(folder, options.images),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--images", type=int, default=48, help="of the extraction")
    options = parser.parse_args()
    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](Path(folder), options)


if __name__ == "__main__":
    main()
