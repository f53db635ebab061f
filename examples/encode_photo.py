"""Encodes a photograph with transformers alone: python encode_photo.py MODEL_FOLDER PHOTO OUT.safetensors"""

import sys
import time

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel


folder, photo, out = sys.argv[1:]

started = time.perf_counter()
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
loaded = time.perf_counter()

image = Image.open(photo)
batch = processor(image, return_tensors="pt")
tiled = time.perf_counter()

with torch.inference_mode():
    tokens = model.get_image_features(batch["pixel_values"])
encoded = time.perf_counter()

columns, rows = batch["tile_grids"][0].tolist()
print(f"   load   {loaded - started:6.2f} s   {type(model).__name__} in {next(model.parameters()).dtype}")
print(
    f"   tile   {tiled - loaded:6.2f} s   {image.width} x {image.height} pixels -> {columns} x {rows} tiles, thumbnail"
)
print(f"   encode {encoded - tiled:6.2f} s   {tuple(batch['pixel_values'].shape)} -> tokens {tuple(tokens.shape)}")
save_file({"tokens": tokens, "tile_grid": batch["tile_grids"][0]}, out)
