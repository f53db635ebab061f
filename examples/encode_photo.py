"""Encode a photo with transformers only: python encode_photo.py MODEL_FOLDER PHOTO OUT.safetensors"""

import argparse
import time

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", metavar="MODEL_FOLDER")
parser.add_argument("photo", metavar="PHOTO")
parser.add_argument("out", metavar="OUT.safetensors")
parser.add_argument("--max-tiles", type=int, default=8, help="without the thumbnail (8)")
parser.add_argument(
    "--dtype",
    choices=("auto", "float32", "bfloat16", "float16"),
    default="auto",
    help="auto: float32, native on every CPU; bfloat16 is faster on a CPU with bfloat16 instructions",
)
options = parser.parse_args()
dtype, reason = torch.float32, "native on every CPU"
if options.dtype != "auto":
    dtype, reason = getattr(torch, options.dtype), "as requested"

started = time.perf_counter()
processor = AutoImageProcessor.from_pretrained(options.folder, trust_remote_code=True)
model = AutoModel.from_pretrained(options.folder, trust_remote_code=True, dtype=dtype).eval()
loaded = time.perf_counter()

image = Image.open(options.photo)
batch = processor(image, max_tiles=options.max_tiles, return_tensors="pt")
tiled = time.perf_counter()

with torch.inference_mode():
    tokens = model.get_image_features(batch["pixel_values"])
encoded = time.perf_counter()

columns, rows = batch["tile_grids"][0].tolist()
print(f"   load   {loaded - started:6.2f} s   {type(model).__name__} in {dtype}, {reason}")
print(
    f"   tile   {tiled - loaded:6.2f} s   {image.width} x {image.height} pixels -> {columns} x {rows} tiles, thumbnail"
)
print(f"   encode {encoded - tiled:6.2f} s   {tuple(batch['pixel_values'].shape)} -> tokens {tuple(tokens.shape)}")
save_file({"tokens": tokens, "tile_grid": batch["tile_grids"][0]}, options.out)
