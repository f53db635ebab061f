# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""A photograph, the few lines that encode it, and a world of drawn pictures (`miniature`)."""
