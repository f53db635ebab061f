# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The command `sailvit VERB`. Thin: every verb is a function of the folder it names, imported when it is called for, so
that `sailvit --help` starts without torch (which is why this file stands beside the package, not in it).

Exit codes: 0 done, 2 wrong usage or bad input (one line on stderr), 130 interrupted, 1 a failure of ours.
"""

import argparse
import ast
import importlib.util
import json
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO


if TYPE_CHECKING:
    from sailvit import SAILViTImageProcessor

LAYOUTS = ("sailvit", "lit", "ovis2", "transformers", "ovis2-transformers", "timm")
FIGURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
WORTH_TELLING = 100_000_000  # bytes; the progress of fewer is not printed line by line


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see `{self.prog} --help`\n")


def main(arguments: list[str] | None = None) -> int:
    parsed = _parser().parse_args(arguments)
    # transformers imports torchao where it is installed, and of how that registers its enums torch warns at length.
    os.environ.setdefault("TORCH_LOGS", "-torch.utils._pytree")
    try:
        return parsed.run(parsed)
    except BrokenPipeError:  # whoever read the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()
        line = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)
        print(f"sailvit {parsed.verb}: {line}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "VerificationError":
            raise
        print(f"sailvit {parsed.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"sailvit {parsed.verb}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sailvit",
        description="The SAILViT vision tower and SAIL-VL: convert, compose, inspect, push, encode.",
        epilog="Exit codes: 0 done, 2 wrong usage or bad input, 130 interrupted, 1 a failure of this package.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    _add_convert(verbs)
    _add_compose(verbs)
    _add_inspect(verbs)
    _add_push(verbs)
    _add_encode(verbs)
    demo = verbs.add_parser("demo", help="the first steps, without any download", description=_demo.__doc__)
    demo.add_argument("--out", type=Path, default=Path("sailvit-demo"), metavar="DIR", help="default: sailvit-demo/")
    demo.add_argument("--size", default="large", choices=("base", "large", "huge", "1b", "3b"))
    demo.add_argument("--model", metavar="M", help="real weights: a file, a folder or a name on the Hub")
    _add_dtype(demo)
    demo.set_defaults(run=_demo)
    return parser


def _add_encode(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    encode = verbs.add_parser("encode", help="images to visual tokens", description=_encode.__doc__)
    encode.add_argument("images", nargs="+", metavar="IMAGE", help="a file, a folder (searched through) or a URL")
    encode.add_argument("--model", required=True, metavar="M", help="a SAILViT folder, or a name on the Hub")
    encode.add_argument("--out", type=Path, default=Path("tokens"), metavar="DIR", help="default: tokens/")
    encode.add_argument("--format", choices=("safetensors", "npy"), default="safetensors")
    encode.add_argument(
        "--figure", type=Path, metavar="PNG", help="draw the tiles and the tokens of the one image given"
    )
    encode.add_argument(
        "--batch-size", type=_positive_integer, default=8, metavar="N", help="tiles in a micro-batch (8)"
    )
    encode.add_argument("--workers", type=_count, default=0, metavar="N", help="processes that read ahead (0)")
    encode.add_argument(
        "--max-tiles", type=_positive_integer, metavar="N", help="tiles of an image, the thumbnail not counted"
    )
    encode.add_argument("--no-tile", action="store_true", help="resize every image to one tile")
    encode.add_argument("--exif-transpose", action="store_true", help="turn pictures upright as their EXIF says")
    encode.add_argument(
        "--image-option",
        action="append",
        default=[],
        type=_named_value,
        metavar="NAME=VALUE",
        help="any option of the image processor, as an error asks for it: do_rescale=False, resize_backend=pil, ...",
    )
    encode.add_argument("--device", metavar="D", help="cpu, cuda, ...; default: a GPU if there is one")
    _add_dtype(encode)
    encode.add_argument("--strict", action="store_true", help="stop at the first broken image")
    existing = encode.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace tokens that are there already")
    existing.add_argument("--resume", action="store_true", help="leave tokens that are there already, do the others")
    encode.set_defaults(run=_encode)


def _add_dtype(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="to compute in; auto: that of the weights where the device has units for it, else float32",
    )


def _add_convert(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    convert = verbs.add_parser("convert", help="a checkpoint in any layout to a folder", description=_convert.__doc__)
    _add_source(convert)
    convert.add_argument("out", type=Path, metavar="OUT", nargs="?", help="the folder to be")
    convert.add_argument(
        "--refresh-code",
        action="store_true",
        help="instead of all else: this package's code in the place of that in the folder SRC, weights untouched",
    )
    convert.add_argument(
        "--part",
        choices=("vision", "connector", "language", "all"),
        help="what of a SAIL-VL is taken; default: all of it",
    )
    convert.add_argument("--base", metavar="BASE", help="what the training began with: has what a stage left frozen")
    convert.add_argument("--average", nargs="+", default=(), metavar="SRC", help="take the mean of SRC and these")
    convert.add_argument("--insert-vision", metavar="TOWER", help="a tower to take the place of the SAIL-VL's")
    convert.add_argument(
        "--to-layout",
        choices=LAYOUTS,
        help="sailvit, the default, transformers and timm load it; for the others it is part of a model",
    )
    convert.add_argument("--image-size", type=_positive_integer, metavar="PIXELS", help="resample learned positions")
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the source's")
    convert.add_argument(
        "--max-shard-size", metavar="SIZE", help="such as 200MB or 5GB, the default where weights are written anew"
    )
    convert.add_argument(
        "--link", action="store_true", help="files that stay as they are may be hard links: writing to them changes SRC"
    )
    convert.add_argument("--no-verify", action="store_true", help="do not load the folder and hold it to the source")
    convert.add_argument(
        "--overwrite",
        action="store_true",
        help="replace all of OUT, if a conversion wrote it; with --refresh-code: replace code that was edited",
    )
    convert.set_defaults(run=_convert)


def _add_compose(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    compose = verbs.add_parser(
        "compose", help="a tower and a language model to a new model", description=_compose.__doc__
    )
    compose.add_argument("out", type=Path, metavar="OUT", help="the folder to be")
    compose.add_argument("--vision", required=True, metavar="TOWER", help="a file, a folder or a name on the Hub")
    compose.add_argument("--language", required=True, metavar="LLM", help="a folder or a name on the Hub")
    compose.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the language model's")
    compose.add_argument("--seed", type=_count, default=0, metavar="N", help="of the fresh connector (0)")
    compose.add_argument(
        "--max-tiles", type=_positive_integer, metavar="N", help="tiles of an image, the thumbnail not counted"
    )
    compose.add_argument("--no-verify", action="store_true", help="do not load the folder in a fresh process")
    compose.add_argument("--overwrite", action="store_true", help="replace all of OUT, if it was written here")
    compose.set_defaults(run=_compose)


def _add_inspect(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    inspect = verbs.add_parser("inspect", help="what is this checkpoint, is it whole?", description=_inspect.__doc__)
    inspect.add_argument("--deep", action="store_true", help="read the data too: NaN, hashes")
    inspect.add_argument("--json", action="store_true", help="for a program")
    _add_source(inspect)
    inspect.set_defaults(run=_inspect)


def _add_push(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    push = verbs.add_parser("push", help="a folder to the Hub, once it has passed the gate", description=_push.__doc__)
    push.add_argument("folder", type=Path, metavar="FOLDER", help="what convert, compose or save_pretrained wrote")
    push.add_argument("repo", metavar="OWNER/NAME", help="made if it is not there")
    push.add_argument("--private", action="store_true", help="the repository is to be private")
    push.add_argument("--create-pr", action="store_true", help="open a pull request on a repository that is there")
    push.add_argument("--branch", metavar="B", help="made from main if it is not there; default: main")
    push.add_argument("--tag", metavar="T", help="put on the commit; the card pins it")
    push.add_argument("--revision-note", metavar="TEXT", help="below the title of the commit")
    push.set_defaults(run=_push)


def _add_source(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("source", metavar="SRC", help="a file, a folder or a name on the Hub")
    verb.add_argument("--revision", metavar="REV", help="branch, tag or commit on the Hub")
    verb.add_argument("--from-layout", choices=LAYOUTS, help="default: recognised from the names")
    verb.add_argument("--prefix", metavar="P", help="what stands before the names of the tower that is meant")
    verb.add_argument("--trust-pickle", action="store_true", help="let files of torch.save run code of their own")


def _encode(options: argparse.Namespace) -> int:
    """Encodes images and writes the tokens of each to DIR/IMAGE.safetensors (or .npy). A broken image is named and
    skipped; the exit code is then 2."""
    from transformers import logging

    from sailvit.encode.figure import draw_tokens
    from sailvit.encode.stream import encode_images, find_images, load_config, load_tower
    from sailvit.encode.write import write_tokens

    logging.disable_progress_bar()
    images = find_images(options.images)
    _check_outputs(list(images), options)
    targets = {source: options.out / f"{name}.{options.format}" for source, name in images.items()}
    targets = _without_existing(targets, options)
    if not targets:
        print(f"{len(images)} encoded already")
        return 0
    processor = _processor(options, load_config(options.model).image_size)
    model = load_tower(options.model, options.device, options.dtype, log=lambda line: print(line, flush=True))
    progress, broken = _Progress(len(targets)), 0
    for image in encode_images(list(targets), model, processor, options.batch_size, options.workers):
        for warning in image.warnings:
            progress.tell(f"warning: {warning}", sys.stderr)
        if image.error:
            broken += 1
            # The processor's messages name its options as a call in Python takes them.
            advice = re.sub(r'\bpass (\w+)="?(\w+)"?', r"give --image-option \1=\2", image.error)
            progress.step(f"broken: {advice}", to=sys.stderr)
            if options.strict:
                break
            continue
        write_tokens(image, targets[image.source])
        progress.step(f"{targets[image.source]}  {tuple(image.tokens.shape)}")
        if options.figure:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # told already
                picture = processor.read_picture(image.source)
            draw_tokens(picture, image.tokens, image.grid, model.config.pixel_shuffle_factor).save(options.figure)
    progress.close()
    kept = f", {len(images) - len(targets)} encoded already" if options.resume else ""
    print(f"{progress.done - broken} encoded, {broken} broken, {len(targets) - progress.done} not tried{kept}")
    return 2 if broken else 0


def _check_outputs(sources: list[str], options: argparse.Namespace) -> None:
    """Whatever would fail after the work is refused before it."""
    figure = options.figure
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file: name a folder")
    if figure is None:
        return
    if len(sources) != 1:
        raise ValueError(f"--figure draws one image, {len(sources)} are given")
    if options.resume:
        raise ValueError("--figure draws an image as it is encoded: --resume does not go with it")
    if figure.suffix.lower() not in FIGURE_SUFFIXES or not figure.parent.is_dir():
        raise ValueError(f"--figure {figure}: one of {', '.join(FIGURE_SUFFIXES)} in a folder that exists is wanted")
    is_source = figure.exists() and Path(sources[0]).exists() and figure.samefile(sources[0])
    if is_source or (figure.exists() and not options.overwrite):
        raise ValueError(f"--figure {figure} exists: name another file, or give --overwrite if it is not the image")


def _without_existing(targets: dict[str, Path], options: argparse.Namespace) -> dict[str, Path]:
    existing = {source for source, target in targets.items() if target.exists() and not options.overwrite}
    if existing and not options.resume:
        raise ValueError(f"{targets[min(existing)]} exists: give --overwrite, --resume or another --out")
    return {source: target for source, target in targets.items() if source not in existing}


def _processor(options: argparse.Namespace, image_size: int) -> "SAILViTImageProcessor":
    """The processor of the model's folder, with what the command line overrides."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(options.model, **_image_options(options))
    height, width = processor.size["height"], processor.size["width"]
    if (height, width) != (image_size, image_size):
        raise ValueError(
            f"{options.model}: the image processor has tiles of {height} x {width} pixels, the model of {image_size}: "
            "mend size in preprocessor_config.json, or give no other --image-option size"
        )
    return processor


def _image_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of the image processor's options."""
    from sailvit import SAILViTImageProcessor

    flags = {
        "max_tiles": options.max_tiles,
        "do_tile": False if options.no_tile else None,
        "do_exif_transpose": options.exif_transpose or None,
    }
    given = [(name, value) for name, value in flags.items() if value is not None] + options.image_option
    names = SAILViTImageProcessor.valid_kwargs.__annotations__.keys() - {"device", "return_tensors"}
    for name, _ in given:
        if name not in names:
            try:
                SAILViTImageProcessor.refuse_unknown({name: None})
            except TypeError as error:
                raise ValueError(f"--image-option: {error}") from error
            raise ValueError(f"--image-option: expected one of {', '.join(sorted(names))}, got {name[:80]!r}")
        if [other for other, _ in given].count(name) > 1:
            raise ValueError(f"{name} is given twice")
    return dict(given)


def _convert(options: argparse.Namespace) -> int:
    """Writes a checkpoint, a tower, a SAIL-VL or a part of one, to a folder that loads by itself, and holds it against
    the source."""
    _without_classes()
    if options.refresh_code:
        return _refresh(options)
    if options.out is None:
        raise ValueError(f"{options.source}: OUT, the folder to be, is missing")
    from sailvit.convert import convert_checkpoint
    from sailvit.convert.verify.outputs import describe

    _clear_away_when_ended()
    progress = _ByteProgress()
    try:
        done = convert_checkpoint(
            options.source,
            options.out,
            **{key: vars(options)[key] for key in ("part", "insert_vision", "base", "average", "to_layout",
               "from_layout", "prefix", "image_size", "dtype", "revision", "max_shard_size", "trust_pickle",
               "link", "overwrite")},
            verify=not options.no_verify,
            log=lambda line: print(line, flush=True),
            on_progress=progress,
        )  # fmt: skip
    finally:
        progress.close()
    if done.verification:
        print(describe(done.verification))
    else:
        print("not verified" if options.no_verify else "not verified: nothing loads these tensors alone")
    print(f"{options.out}")
    return 0


def _refresh(options: argparse.Namespace) -> int:
    """The code of a folder in place; what else convert is asked for means nothing then."""
    from sailvit.convert import refresh_code

    plain = vars(_parser().parse_args(["convert", options.source]))
    fits = ("refresh_code", "overwrite", "no_verify")
    if wrong := [key for key, value in vars(options).items() if value != plain[key] and key not in fits]:
        name = "OUT" if wrong[0] == "out" else f"--{wrong[0].replace('_', '-')}"
        raise ValueError(f"--refresh-code renews the code of {options.source} in place: leave out {name}")
    done = refresh_code(
        options.source,
        overwrite=options.overwrite,
        verify=not options.no_verify,
        log=lambda line: print(line, flush=True),
    )
    print(f"{options.source}: code of version {done.after}, before {done.before}; files written: {len(done.files)}")
    return 0


def _compose(options: argparse.Namespace) -> int:
    """Makes a new multimodal model of a tower, a fresh connector and a language model, and loads it in a fresh process.
    The connector has to be trained."""
    _without_classes()
    from transformers import logging

    from sailvit.convert import compose_model
    from sailvit.convert.verify.outputs import describe

    logging.disable_progress_bar()
    _clear_away_when_ended()
    done = compose_model(
        options.vision,
        options.language,
        options.out,
        **{key: vars(options)[key] for key in ("dtype", "seed", "max_tiles", "overwrite")},
        verify=not options.no_verify,
        log=lambda line: print(line, flush=True),
    )
    print(describe(done.verification) if done.verification else "not verified")
    print(f"{options.out}")
    return 0


def _clear_away_when_ended() -> None:
    """Has a signal that ends the process clear away what was begun."""
    for end in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        signal.signal(end, lambda number, frame: sys.exit(128 + number))


def _inspect(options: argparse.Namespace) -> int:
    """Says what a file, a folder or a model on the Hub is, and what is wrong with it; the exit code is 2 if something
    is."""
    _without_classes()
    from sailvit.convert import inspect_checkpoint

    progress = _ByteProgress()
    arguments = ("revision", "from_layout", "prefix", "trust_pickle", "deep")
    report = inspect_checkpoint(options.source, **{key: vars(options)[key] for key in arguments}, on_progress=progress)
    progress.close()
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        from sailvit.convert.inspect import table

        print(table(report))
    return 0 if report.ok else 2


def _push(options: argparse.Namespace) -> int:
    """Publishes a folder in one commit: writes its card, has a clean process load a copy of it, uploads what the Hub
    lacks, and compares what is there then. If it was cut off, calling it again finishes it."""
    _without_classes()
    from huggingface_hub.utils import disable_progress_bars

    from sailvit.hub import PublishError, push_folder

    if not sys.stderr.isatty():
        disable_progress_bars()
    arguments = ("private", "create_pr", "branch", "tag", "revision_note")
    try:
        done = push_folder(
            options.folder,
            options.repo,
            **{key: vars(options)[key] for key in arguments},
            log=lambda line: print(line, flush=True),
        )
    except PublishError as error:
        for problem in error.problems:
            print(f"{problem.kind:<12} {problem}", flush=True)
        raise
    counts = f"files uploaded: {len(done.uploaded)}, taken away: {len(done.deleted)}"
    print(f"{counts}; every hash there is that of the folder")
    print(f"{done.url}  revision {done.tag or done.commit}")
    return 0


def _without_classes() -> None:
    """Lets submodules of `sailvit` be imported without the package itself, which registers its classes and so imports
    torch: what reads and writes files has no use for them."""
    spec = importlib.util.find_spec("sailvit")
    sys.modules.setdefault("sailvit", importlib.util.module_from_spec(spec))


def _demo(options: argparse.Namespace) -> int:
    """Makes a checkpoint with random weights in Apple's names, converts and inspects it, loads it with remote code,
    encodes a photograph and draws what came of it."""
    _without_classes()
    from sailvit.encode.demo import run_demo

    if options.out.exists():
        raise ValueError(f"{options.out} exists: remove it, or give another --out")
    run_demo(options.out, lambda line: print(line, flush=True), options.size, options.model, options.dtype)
    return 0


class _Progress:
    """A bar on a terminal, elsewhere a plain line every ten seconds, for the first step and for every error."""

    def __init__(self, total: int):
        from tqdm import tqdm

        self.total, self.done, self.said = total, 0, 0.0
        self.bar = tqdm(total=total, unit="image") if sys.stderr.isatty() else None

    def step(self, line: str, to: TextIO | None = None) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update()
        if to is not None or self.total == 1:
            self.tell(line, to or sys.stdout)
        elif self.bar is None and time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            print(f"{self.done}/{self.total}  {line}", flush=True)

    def tell(self, line: str, to: TextIO) -> None:
        """A line that is no step."""
        (self.bar.write if self.bar is not None else print)(line, file=to)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class _ByteProgress:
    """A bar on a terminal, elsewhere a plain line every ten seconds where there is much to do."""

    def __init__(self) -> None:
        self.bar, self.said = None, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = self.bar or tqdm(total=total, unit="B", unit_scale=True)
            self.bar.update(done - self.bar.n)
        elif total >= WORTH_TELLING and time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            print(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _named_value(text: str) -> tuple[str, Any]:
    """ "do_rescale=False" -> ("do_rescale", False)."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text[:80]!r}")
    try:
        return name, ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    except (ValueError, SyntaxError):
        return name, value  # a word


def _count(text: str) -> int:
    return 0 if text == "0" else _positive_integer(text)


def _positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a positive whole number is wanted, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
