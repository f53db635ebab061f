# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verb `show`: an interactive page, or PNGs, of one image as an encoder sees it."""

import argparse
import shlex
import sys
from pathlib import Path

from .arguments import Group, Verbs, add_compute_dtype, add_max_tiles, add_verb, pick
from .progress import log


def add_verbs(verbs: Verbs) -> None:
    show = add_verb(verbs, "show", run_show, "IMAGE --model M [options]", "show what an encoder makes of one image")
    _add_input(show.add_argument_group("input"))
    _add_output(show.add_argument_group("output"))
    group = show.add_argument_group("compute")
    group.add_argument("--device", metavar="D", help="cpu, cuda, ...; default: a GPU if there is one")
    add_compute_dtype(group)


def _add_input(group: Group) -> None:
    group.add_argument("image", metavar="IMAGE", help="a file or a URL")
    group.add_argument(
        "--model", required=True, metavar="M", help="a vision encoder or a multimodal model: a folder or a Hub name"
    )
    group.add_argument(
        "--layer", type=int, metavar="N", help="tokens after block N; -1: after the final norm, the default"
    )
    group.add_argument(
        "--blocks", type=_numbers, default=(), metavar="N,N", help="blocks whose attention is shown by query"
    )
    group.add_argument(
        "--at", type=float, nargs=2, metavar=("X", "Y"), help="pixel that is shown first; default: the middle"
    )
    add_max_tiles(group)
    group.add_argument(
        "--exif-transpose", action="store_true", help="rotate the image as its EXIF orientation requires"
    )


def _add_output(group: Group) -> None:
    group.add_argument("--out", type=Path, metavar="HTML", help="default: the name of the image with .html")
    group.add_argument("--png", type=Path, metavar="DIR", help="also write the pictures of the page as PNGs")
    group.add_argument("--overwrite", action="store_true", help="replace existing files")


def _numbers(text: str) -> tuple[int, ...]:
    """Parse "8,16,24", numbers from 1, to indices from 0."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected numbers from 1 with commas between, got {text[:80]!r}")
    return tuple(int(part) - 1 for part in parts)


def run_show(options: argparse.Namespace) -> int:
    """
    Show the tiles, tokens and attention of one image in a self-contained HTML page.

    examples:
      sailvit show photo.jpg --model sailvit-large --out photo.html
      sailvit show photo.jpg --model sail-vl --blocks 6,12,18,24 --at 310 240 --png pictures
    """
    from transformers import logging

    from sailvit.evaluate.show import (
        check_image,
        check_outputs,
        draw_pngs,
        load_tiled_encoder,
        page,
        relative_place,
        show_image,
        write_outputs,
    )

    logging.disable_progress_bar()
    out = options.out or Path(Path(options.image).name).with_suffix(".html")
    check_outputs(options.image, out, options.png, options.overwrite)
    check_image(options.image)
    tiling = {"max_tiles": options.max_tiles, "do_exif_transpose": options.exif_transpose or None}
    encoder = load_tiled_encoder(options.model, **pick(options, ("device", "dtype", "layer")), log=log, **tiling)
    shown = show_image(encoder, options.image, options.blocks, log)
    at = relative_place(shown, options.at)
    html = page(shown, at, shlex.join(["sailvit", *sys.argv[1:]]))
    for path in write_outputs(html, out, draw_pngs(shown, at) if options.png else {}, options.png):
        log(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 0
