# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""`python -m sailvit_cli`, the same command."""

import sys

from . import main


sys.exit(main())
