# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""Training data: from conversations on disk to balanced, packed batches."""
