"""`sailvit show`: what an encoder makes of one image."""

from .drawings import check_outputs, draw_pngs, write_outputs
from .page import page
from .tiled_encoder import TiledEncoder, load_tiled_encoder
from .view import Place, ShownImage, check_image, relative_place, show_image


__all__ = [
    "Place",
    "ShownImage",
    "TiledEncoder",
    "check_image",
    "check_outputs",
    "draw_pngs",
    "load_tiled_encoder",
    "page",
    "relative_place",
    "show_image",
    "write_outputs",
]
