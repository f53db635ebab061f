# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The verb serve."""

import argparse

from .arguments import Verbs, add_verb, positive_integer


PASSED_ON = """\
All others go to `transformers serve`, whose help describes them: --port, --device, --dtype, --quantization, --compile,
--continuous-batching, --attn-implementation, ... The default of --host is 127.0.0.1."""


def add_verbs(verbs: Verbs) -> None:
    usage = "MODEL [options] [options of `transformers serve`]"
    serve = add_verb(verbs, "serve", run_serve, usage, "serve a SAIL-VL to OpenAI clients, with transformers' server")
    serve.set_defaults(passed_on=[])
    group = serve.add_argument_group("input")
    group.add_argument("model", metavar="MODEL", help="a SAIL-VL: a folder or a name on the Hub; give it first")
    group = serve.add_argument_group("images of a request")
    group.add_argument(
        "--allow-private-urls",
        action="store_true",
        help="also https: URLs that lead to private, loopback and link-local addresses",
    )
    for name, default, what in (
        ("images", 16, "images"),
        ("bytes", 64_000_000, "bytes of their files together"),
        ("pixels", 64_000_000, "pixels of all together"),
    ):
        group.add_argument(
            f"--max-{name}", type=positive_integer, default=default, metavar="N", help=f"{what}; default: {default:,}"
        )
    serve.add_argument_group("other options", PASSED_ON)


def run_serve(options: argparse.Namespace) -> int:
    """
    Serve a SAIL-VL over HTTP to OpenAI clients: POST /v1/chat/completions, with images and streaming.

    examples:
      sailvit serve sail-vl
      sailvit serve sail-vl --quantization bnb-4bit --port 8001
    """
    from sailvit.serve.images import Limits
    from sailvit.serve.server import run_server

    limits = Limits(
        images=options.max_images,
        size=options.max_bytes,
        pixels=options.max_pixels,
        allow_private=options.allow_private_urls,
    )
    return run_server(options.model, options.passed_on, limits)
