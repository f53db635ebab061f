# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""`python -m sailvit.train`: runs the command `sailvit train`, for launchers that start modules, such as torchrun."""

import runpy
import sys


if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    runpy.run_module("sailvit_cli", run_name="__main__")
