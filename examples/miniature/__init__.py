# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""The miniature: a small SAILViT and SAIL-VL, trained from nothing."""
