# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""`python -m sailvit.train`: the verb train, for launchers that start modules, such as torchrun."""

import sys

from sailvit_cli import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
