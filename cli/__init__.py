# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The command `sailvit VERB`: parse arguments, call the package, print.

It is installed next to the package, under the name `sailvit_cli`: importing `sailvit` imports torch, which
`sailvit --help` does not need. For the same reason the verbs import the package inside their functions.

A new family of verbs is a file with `add_verbs` and a name in FAMILIES.
"""

import argparse
import logging
import os
import sys
from importlib import import_module
from importlib.metadata import version
from typing import NoReturn


FAMILIES = (
    "convert",
    "inspect",
    "encode",
    "show",
    "data",
    "train",
    "probe",
    "report",
    "suite",
    "serve",
    "miniature",
    "push",
)  # files of this folder, in the order of `sailvit --help`
DESCRIPTION = """\
Convert, inspect, run and publish the vision encoder SAILViT and the multimodal model SAIL-VL.

example:
  sailvit convert apple/aimv2-large-patch14-448 sailvit-large"""
EPILOG = """\
`sailvit VERB --help` shows the examples and options of a verb.
Exit codes: 0 success, 2 wrong usage or bad input, 130 interrupted, 1 failed verification or internal failure,
75 a training that was stopped and goes on by the same command."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see `{self.prog} --help`\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a verb and return its exit code: 0, 1, 2, 130 as in EPILOG, or 141 if the reader of the output closed it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
    options = parse(arguments)
    # transformers imports torchao where it is installed; torch warns at length about the enums that it registers.
    os.environ.setdefault("TORCH_LOGS", "-torch.utils._pytree")
    # peft imports bitsandbytes where it is installed, which warns on a CPU that a package of faster products is not.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again when it exits
        return 141
    except (ValueError, OSError, ImportError) as error:
        print(f"sailvit {options.verb}: {_one_line(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from sailvit.convert.storage.errors import VerificationError

        if not isinstance(error, VerificationError):
            raise
        print(f"sailvit {options.verb}: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"sailvit {options.verb}: interrupted", file=sys.stderr)
        return 130


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse arguments; an unknown one is an error of its verb, unless the verb passes it on to another command."""
    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if hasattr(options, "overrides"):  # argparse takes positional arguments up to the next option only
        options.overrides += [word for word in unknown if not word.startswith("-")]
        unknown = [word for word in unknown if word.startswith("-")]
    if hasattr(options, "passed_on"):
        options.passed_on, unknown = unknown, []
    if unknown:
        parser.prog = f"{parser.prog} {options.verb}"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sailvit",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for family in FAMILIES:
        import_module(f".{family}", __name__).add_verbs(verbs)
    group = parser.add_argument_group("options")
    group.add_argument("-h", "--help", action="help", help="show this help and exit")
    group.add_argument("--version", action="version", version=f"sailvit {version('sailvit')}", help="show it and exit")
    return parser


def _one_line(error: Exception) -> str:
    """Return the message of an error on one line, unprintable characters escaped."""
    line = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)
