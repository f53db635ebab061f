# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verbs that write a model folder: `convert` and `compose`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    DTYPES,
    LAYOUTS,
    Group,
    Verbs,
    add_max_tiles,
    add_source,
    add_trust_pickle,
    add_verb,
    pick,
    positive_integer,
    seed,
    some_of,
)
from .progress import byte_progress, log
from .startup import exit_on_signals, import_with_torch, import_without_torch


if TYPE_CHECKING:
    from PIL import Image

# Options of convert that --refresh-code excludes; their names are those of convert_checkpoint's arguments.
CONVERSION_OPTIONS = (
    *("revision", "from_layout", "prefix", "base", "average", "insert_vision"),
    *("part", "to_layout", "image_size", "dtype", "max_shard_size", "link", "trust_pickle"),
)
ONNX = "onnx"
ONNX_ONLY = ("with_connector", "calibration")
NOT_ONNX = ("insert_vision", "max_shard_size", "link")  # of CONVERSION_OPTIONS


def add_verbs(verbs: Verbs) -> None:
    _add_convert(verbs)
    _add_compose(verbs)


def _add_convert(verbs: Verbs) -> None:
    summary = "convert a checkpoint in any layout to a model folder"
    convert = add_verb(verbs, "convert", run_convert, "SRC OUT [options]", summary)
    _add_convert_input(convert.add_argument_group("input"))
    _add_convert_output(convert.add_argument_group("output"))
    checks = convert.add_argument_group("checks")
    checks.add_argument(
        "--no-verify", action="store_true", help="do not load the folder and compare its outputs with the source's"
    )
    checks.add_argument(
        "--calibration",
        nargs="+",
        metavar="IMAGE",
        help="ONNX: pictures that int8 is compared on; default: drawn ones",
    )
    add_trust_pickle(checks)


def _add_convert_input(group: Group) -> None:
    add_source(group)
    group.add_argument(
        "--base", metavar="BASE", help="the model that training started from: has the parameters a stage left frozen"
    )
    group.add_argument("--average", nargs="+", default=(), metavar="SRC", help="average SRC and these checkpoints")
    group.add_argument("--insert-vision", metavar="ENCODER", help="replace the SAIL-VL's vision encoder with this one")


def _add_convert_output(group: Group) -> None:
    group.add_argument("out", type=Path, metavar="OUT", nargs="?", help="the folder to write")
    group.add_argument(
        "--part",
        choices=("vision", "connector", "language", "all"),
        help="the component of a SAIL-VL to convert; default: all",
    )
    group.add_argument(
        "--to-layout",
        choices=(*LAYOUTS, ONNX),
        help="default: sailvit. transformers, timm and onnxruntime load theirs; the others are parts of larger models",
    )
    group.add_argument(
        "--image-size", type=positive_integer, metavar="PIXELS", help="resample learned position embeddings to it"
    )
    group.add_argument(
        "--dtype",
        type=some_of(*DTYPES, "int8"),
        metavar="D[,D...]",
        help="float32, bfloat16 or float16, default: the source's; for ONNX one or several of float32, float16 and "
        "int8, a file for each, default: float32",
    )
    group.add_argument(
        "--with-connector", action="store_true", help="ONNX: with the SAIL-VL's connector, up to language embeddings"
    )
    group.add_argument(
        "--max-shard-size", metavar="SIZE", help="200MB for example; default: 5GB where weights are rewritten"
    )
    group.add_argument(
        "--link",
        action="store_true",
        help="hard-link unchanged weight files where reflinks are impossible: writing to them changes SRC",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUT if a conversion wrote it; with --refresh-code: replace edited code",
    )
    group.add_argument(
        "--refresh-code",
        action="store_true",
        help="instead of converting: update the model code in the folder SRC to this package's, weights untouched",
    )


def _add_compose(verbs: Verbs) -> None:
    summary = "combine a vision encoder and a language model"
    compose = add_verb(verbs, "compose", run_compose, "OUT --vision ENCODER --language LLM [options]", summary)
    group = compose.add_argument_group("input")
    group.add_argument("--vision", required=True, metavar="ENCODER", help="a file, a folder or a name on the Hub")
    group.add_argument("--language", required=True, metavar="LLM", help="a folder or a name on the Hub")
    group = compose.add_argument_group("output")
    group.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    group.add_argument("--dtype", choices=DTYPES, help="default: the language model's")
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of the connector's weights; default: 0")
    add_max_tiles(group)
    group.add_argument("--overwrite", action="store_true", help="replace OUT if this package wrote it")
    group = compose.add_argument_group("checks")
    group.add_argument("--no-verify", action="store_true", help="do not load the folder in a clean process")


def run_convert(options: argparse.Namespace) -> int:
    """
    Convert a checkpoint to a folder that from_pretrained loads, and compare the outputs of both.

    examples:
      sailvit convert apple/aimv2-large-patch14-448 sailvit-large --dtype bfloat16
      sailvit convert run/checkpoint-4000 stage3-vit --part vision --base sail-vl
    """
    import_without_torch()
    if options.refresh_code:
        return _refresh_code(options)
    if options.out is None:
        raise ValueError(f"{options.source}: expected an output folder OUT after it")
    from sailvit.convert import convert_checkpoint
    from sailvit.convert.verify.outputs import describe

    exit_on_signals()
    if options.to_layout == ONNX:
        return _convert_to_onnx(options)
    arguments = _torch_options(options)
    with byte_progress() as on_progress:
        done = convert_checkpoint(
            options.source,
            options.out,
            **arguments,
            overwrite=options.overwrite,
            verify=not options.no_verify,
            log=log,
            on_progress=on_progress,
        )
    if done.verification:
        print(describe(done.verification))
    else:
        print("not verified" if options.no_verify else "not verified: nothing loads these tensors alone")
    print(options.out)
    return 0


def _torch_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of convert_checkpoint; raise ValueError for an option that only ONNX has."""
    dtypes = options.dtype or [None]
    for given, name in (
        (len(dtypes) > 1 or dtypes == ["int8"], "dtype"),
        *((getattr(options, n), n) for n in ONNX_ONLY),
    ):
        if given:
            value = f" {','.join(dtypes)}" if name == "dtype" else ""
            raise ValueError(f"--{name.replace('_', '-')}{value}: only for --to-layout onnx: add that, or leave it out")
    return pick(options, CONVERSION_OPTIONS) | {"dtype": dtypes[0]}


def _convert_to_onnx(options: argparse.Namespace) -> int:
    import_with_torch()  # the encoder is built by the package's own code
    from transformers import logging

    from sailvit.examples.miniature.draw import draw_scenes
    from sailvit.exporters.folder import convert_to_onnx

    logging.disable_progress_bar()
    for name in NOT_ONNX:
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')}: not for --to-layout {ONNX}: leave it out")
    if options.calibration and options.no_verify:
        raise ValueError("--calibration: --no-verify compares nothing: leave out one of them")
    if options.calibration and "int8" not in (options.dtype or ()):
        raise ValueError("--calibration: only int8 is compared on pictures: add int8 to --dtype, or leave it out")
    opened = [_open_image(path) for path in options.calibration or ()]
    figures = convert_to_onnx(
        options.source,
        options.out,
        **pick(options, [name for name in CONVERSION_OPTIONS if name not in (*NOT_ONNX, "to_layout", "dtype")]),
        **pick(options, ("with_connector", "overwrite")),
        dtypes=options.dtype or ["float32"],
        pictures=(lambda size: opened) if opened else draw_scenes,
        verify=not options.no_verify,
        log=log,
    )
    if figures is None:
        print("not verified")
    print(options.out)
    return 0


def _open_image(path: str) -> "Image.Image":
    from sailvit import SAILViTImageProcessor

    try:
        return SAILViTImageProcessor().to_rgb_image(path)
    except ValueError as error:
        raise ValueError(f"--calibration {path}: {str(error).removeprefix('image: ')}") from error


def _refresh_code(options: argparse.Namespace) -> int:
    from sailvit.convert import refresh_code

    for name in ("out", *CONVERSION_OPTIONS, *ONNX_ONLY):
        if getattr(options, name) not in (None, False, ()):
            excluded = "OUT" if name == "out" else f"--{name.replace('_', '-')}"
            raise ValueError(f"--refresh-code updates the code of {options.source} in place: leave out {excluded}")
    done = refresh_code(options.source, overwrite=options.overwrite, verify=not options.no_verify, log=log)
    print(f"{options.source}: code of version {done.after}, before {done.before}; files written: {len(done.files)}")
    return 0


def run_compose(options: argparse.Namespace) -> int:
    """
    Build a multimodal model from a vision encoder, a randomly initialised connector and a language model.

    examples:
      sailvit compose new-vl --vision sailvit-large --language Qwen/Qwen2.5-1.5B-Instruct
      sailvit compose new-vl --vision stage3-vit --language Qwen/Qwen2.5-7B-Instruct --dtype bfloat16
    """
    import_without_torch()
    from transformers import logging

    from sailvit.convert import compose_model
    from sailvit.convert.verify.outputs import describe

    logging.disable_progress_bar()
    exit_on_signals()
    done = compose_model(
        options.vision,
        options.language,
        options.out,
        **pick(options, ("dtype", "seed", "max_tiles", "overwrite")),
        verify=not options.no_verify,
        log=log,
    )
    print(describe(done.verification) if done.verification else "not verified")
    print(options.out)
    return 0
