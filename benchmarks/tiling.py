"""
Benchmark of tiling against the released Pillow pipeline and transformers' GotOcr2ImageProcessor.

Photos of 0.06 to 6 megapixels, interleaved in one process; also the time per tile in a batch against single images.

    python benchmarks/tiling.py
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 python benchmarks/tiling.py  # no page faults
"""

from pathlib import Path

import torch
import torchvision.transforms as T
from PIL import Image
from timing import medians, print_ratios
from transformers import GotOcr2ImageProcessor

from sailvit import SAILViTImageProcessor, choose_tile_grid


SIZES = [(300, 200), (640, 480), (800, 600), (1024, 768), (1920, 1080), (1200, 1600), (3000, 2000), (480, 1280)]
TO_TENSOR = T.Compose([T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])


def card_tiles(image: Image.Image) -> torch.Tensor:
    """Return tiles and thumbnail as the released code computes them, with Pillow, ToTensor and Normalize."""
    image = image.convert("RGB")
    columns, rows = choose_tile_grid(*image.size)
    large = image.resize((448 * columns, 448 * rows), Image.BICUBIC)
    boxes = [(448 * (i % columns), 448 * (i // columns)) for i in range(columns * rows)]
    tiles = [large.crop((left, top, left + 448, top + 448)) for left, top in boxes]
    return torch.stack([TO_TENSOR(tile) for tile in [*tiles, image.resize((448, 448), Image.BICUBIC)]])


def main() -> None:
    photograph = Image.open(Path(__file__).parents[1] / "examples" / "raccoon.jpg")
    images = [photograph.resize(size, Image.LANCZOS) for size in SIZES]
    ours = SAILViTImageProcessor()
    got = GotOcr2ImageProcessor(size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=8)
    one_tile = [photograph.resize((600, 600))] * 8
    seconds = medians(
        {
            "card": lambda: torch.cat([card_tiles(image) for image in images]),
            "GotOcr2": lambda: got(images, return_tensors="pt"),
            "ours, pil backend": lambda: ours(images, resize_backend="pil"),
            "ours": lambda: ours(images),
            "8 photos of 7 tiles, single": lambda: [ours(photograph) for _ in range(8)],
            "8 photos of 7 tiles, batched": lambda: ours([photograph] * 8),
            "8 photos of 1 tile, single": lambda: [ours(image, do_tile=False) for image in one_tile],
            "8 photos of 1 tile, batched": lambda: ours(one_tile, do_tile=False),
        },
        rounds=15,
    )
    for name, value in seconds.items():
        print(f"{value * 1e3:8.1f} ms  {name}")
    names = ("GotOcr2", "ours, pil backend", "ours")
    print_ratios("speed, the card's pipeline = 1", {name: seconds["card"] / seconds[name] for name in names})
    cases = ("8 photos of 7 tiles", "8 photos of 1 tile")
    batch_costs = {case: seconds[f"{case}, batched"] / seconds[f"{case}, single"] for case in cases}
    print_ratios("time per tile in a batch, single images = 1", batch_costs)


if __name__ == "__main__":
    main()
