# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verbs that run a vision encoder on images: `encode` and `demo`."""

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    DTYPES,
    Group,
    Verbs,
    add_computation,
    add_compute_dtype,
    add_max_tiles,
    add_verb,
    named_value,
    pick,
)
from .progress import interval_timer, log, progress_bar
from .startup import import_without_torch


if TYPE_CHECKING:
    from sailvit import SAILViTImageProcessor, SAILViTModel
    from sailvit.encode.onnx_model import OnnxEncoder


def add_verbs(verbs: Verbs) -> None:
    _add_encode(verbs)
    _add_demo(verbs)


def _add_encode(verbs: Verbs) -> None:
    encode = add_verb(
        verbs, "encode", run_encode, "IMAGE [IMAGE ...] --model M [options]", "encode images to visual tokens"
    )
    _add_encode_input(encode.add_argument_group("input"))
    _add_encode_output(encode.add_argument_group("output"))
    group = encode.add_argument_group("checks")
    group.add_argument("--strict", action="store_true", help="stop at the first broken image")
    compute = encode.add_argument_group("compute")
    add_computation(compute, 8, "tiles in a micro-batch", dtypes=(*DTYPES, "int8"))


def _add_encode_input(group: Group) -> None:
    group.add_argument("images", nargs="+", metavar="IMAGE", help="a file, a folder (searched recursively) or a URL")
    group.add_argument("--model", required=True, metavar="M", help="a SAILViT or ONNX folder, or a name on the Hub")
    add_max_tiles(group)
    group.add_argument("--no-tile", action="store_true", help="resize every image to one tile")
    group.add_argument("--exif-transpose", action="store_true", help="rotate images as their EXIF orientation requires")
    group.add_argument(
        "--image-option",
        action="append",
        default=[],
        type=named_value,
        metavar="NAME=VALUE",
        help="any option of the image processor: do_rescale=False, resize_backend=pil, ...; repeatable",
    )


def _add_encode_output(group: Group) -> None:
    group.add_argument("--out", type=Path, default=Path("tokens"), metavar="DIR", help="default: tokens/")
    group.add_argument("--format", choices=("safetensors", "npy"), default="safetensors", help="default: safetensors")
    existing = group.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace existing files")
    existing.add_argument("--resume", action="store_true", help="skip images whose file exists")


def _add_demo(verbs: Verbs) -> None:
    demo = add_verb(verbs, "demo", run_demo, "[options]", "run a trained miniature, without any download")
    group = demo.add_argument_group("input")
    group.add_argument(
        "--size",
        choices=("base", "large", "huge", "1b", "3b"),
        help="convert, inspect and run an encoder of this size with random weights, on a photograph",
    )
    group.add_argument("--model", metavar="M", help="the same with real weights: a file, a folder or a name on the Hub")
    group = demo.add_argument_group("output")
    group.add_argument("--out", type=Path, default=Path("sailvit-demo"), metavar="DIR", help="default: sailvit-demo/")
    add_compute_dtype(demo.add_argument_group("compute"))


def run_encode(options: argparse.Namespace) -> int:
    """
    Encode images and write the visual tokens of each to a file; the exit code is 2 if an image is broken.

    examples:
      sailvit encode photo.jpg --model sailvit-large --out tokens
      sailvit encode album/ --model sailvit-large --out tokens --batch-size 16 --workers 4 --resume
    """
    from transformers import logging

    from sailvit.encode.images import find_images
    from sailvit.encode.load import load_config, load_encoder, load_processor
    from sailvit.encode.write import choose_targets

    logging.disable_progress_bar()
    images = find_images(options.images)
    targets = choose_targets(images, **pick(options, ("out", "format", "overwrite", "resume")))
    if not targets:
        print(f"{len(images)} encoded already")
        return 0
    processor = load_processor(options.model, load_config(options.model).image_size, _image_options(options))
    model = load_encoder(options.model, options.device, options.dtype, log)
    encoded, broken = _encode(targets, model, processor, options)
    skipped = f", {len(images) - len(targets)} encoded already" if options.resume else ""
    print(f"{encoded} encoded, {broken} broken, {len(targets) - encoded - broken} not tried{skipped}")
    return 2 if broken else 0


def _image_options(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """Return the options of the image processor as (name, value)."""
    flags = {
        "max_tiles": options.max_tiles,
        "do_tile": False if options.no_tile else None,
        "do_exif_transpose": options.exif_transpose or None,
    }
    return [(name, value) for name, value in flags.items() if value is not None] + options.image_option


def _encode(
    targets: dict[str, Path],
    model: "SAILViTModel | OnnxEncoder",
    processor: "SAILViTImageProcessor",
    options: argparse.Namespace,
) -> tuple[int, int]:
    """Encode and write images with progress on the terminal; return how many were encoded and how many are broken."""
    from sailvit.encode.stream import encode_images
    from sailvit.encode.write import write_tokens

    encoded = broken = 0
    line_is_due = interval_timer(at_once=True)
    with progress_bar(total=len(targets), unit="image") as bar:
        for image in encode_images(list(targets), model, processor, options.batch_size, options.workers):
            for warning in image.warnings:
                bar.write(f"warning: {warning}", file=sys.stderr)
            bar.update()
            if image.error:
                broken += 1
                bar.write(f"broken: {_as_command_option(image.error)}", file=sys.stderr)
                if options.strict:
                    break
                continue
            encoded += 1
            target = targets[image.source]
            write_tokens(image, target)
            line = f"{target}  {tuple(image.tokens.shape)}"
            if len(targets) == 1:
                bar.write(line)
            elif bar.disable and line_is_due():
                print(f"{encoded + broken}/{len(targets)}  {line}", flush=True)
    return encoded, broken


def _as_command_option(message: str) -> str:
    """Return a message of the image processor with `pass NAME=VALUE` as the command takes it."""
    return re.sub(r'\bpass (\w+)="?(\w+)"?', r"give --image-option \1=\2", message)


def run_demo(options: argparse.Namespace) -> int:
    """
    Encode a drawn picture with the trained miniature that comes with the package, and ask about the picture.

    examples:
      sailvit demo
      sailvit demo --model apple/aimv2-large-patch14-448 --out aimv2-demo
    """
    import_without_torch()
    if options.size is None and options.model is None:
        from sailvit.examples.miniature.demo import run_demo as run_miniature

        run_miniature(options.out, log, options.dtype)
        return 0
    if options.out.exists():
        raise ValueError(f"{options.out} exists: remove it, or give another --out")
    from sailvit.encode.demo import run_demo as run

    run(options.out, log, options.size or "large", options.model, options.dtype)
    return 0
