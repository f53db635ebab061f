# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The help of a verb, and the arguments that several verbs share."""

import argparse
import ast
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias


Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Group: TypeAlias = argparse._ArgumentGroup

# Those of sailvit.convert and sailvit.devices, whose import takes too long for --help; a test compares them.
LAYOUTS = ("sailvit", "lit", "ovis2", "transformers", "ovis2-transformers", "timm")
DTYPES = ("float32", "bfloat16", "float16")


def add_verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int], usage: str, summary: str
) -> argparse.ArgumentParser:
    """
    Add a verb without arguments.

    Args:
        verbs: The subparsers of the command.
        name: What is typed after `sailvit`.
        run: Called with the parsed options, returns the exit code. Its docstring is the head of the verb's help: one
            sentence and two examples.
        usage: The arguments, as the first line of `--help` shows them.
        summary: A few words for `sailvit --help`.
    """
    verb = verbs.add_parser(
        name,
        help=summary,
        usage=f"%(prog)s {usage}",
        description=textwrap.dedent(run.__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    verb.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    verb.set_defaults(run=run)
    return verb


def add_source(group: Group) -> None:
    """Add the checkpoint that a verb reads, and how to find the model in it."""
    group.add_argument("source", metavar="SRC", help="a file, a folder or a name on the Hub")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit on the Hub")
    group.add_argument("--from-layout", choices=LAYOUTS, help="default: detected from the tensor names")
    group.add_argument("--prefix", metavar="P", help="prefix of the tensor names, where several encoders match")


def add_trust_pickle(group: Group) -> None:
    group.add_argument(
        "--trust-pickle",
        action="store_true",
        help="skip objects of unknown classes in torch.save files",
    )


def add_compute_dtype(group: Group, dtypes: Sequence[str] = DTYPES) -> None:
    onnx = "; of an ONNX folder the file with it, the most precise" if "int8" in dtypes else ""
    group.add_argument(
        "--dtype",
        choices=("auto", *dtypes),
        default="auto",
        help=f"to compute in; auto: that of the weights if the device computes it natively, else float32{onnx}",
    )


def add_computation(group: Group, batch_size: int, batch: str, dtypes: Sequence[str] = DTYPES) -> None:
    """Add the options of a command that runs an encoder over many images."""
    group.add_argument("--device", metavar="D", help="cpu, cuda, ...; default: a GPU if there is one")
    add_compute_dtype(group, dtypes)
    group.add_argument(
        "--batch-size", type=positive_integer, default=batch_size, metavar="N", help=f"{batch}; default: {batch_size}"
    )
    group.add_argument(
        "--workers", type=count, default=0, metavar="N", help="processes that read images ahead; default: 0"
    )


def add_max_tiles(group: Group) -> None:
    group.add_argument(
        "--max-tiles", type=positive_integer, metavar="N", help="most tiles of an image, without the thumbnail"
    )


def pick(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the named options as keyword arguments."""
    return {name: getattr(options, name) for name in names}


def named_value(text: str) -> tuple[str, Any]:
    """Parse "do_rescale=False" to ("do_rescale", False); a value that is no Python literal stays a string."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text[:80]!r}")
    try:
        return name, ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    except (ValueError, SyntaxError):
        return name, value


def some_of(*choices: str) -> Callable[[str], list[str]]:
    """Return the parser of an option that takes several of some words, with commas between them."""

    def words(text: str) -> list[str]:
        if wrong := [word for word in text.split(",") if word not in choices]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(choices)}, got {wrong[0]!r}")
        return text.split(",")

    return words


def count(text: str) -> int:
    """Parse an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """Parse what every generator of random numbers takes."""
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {(1 << 32) - 1}, got {text!r}")
    return int(text)


def positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)
