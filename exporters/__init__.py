# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""ONNX folders: the vision encoder for onnxruntime, browsers and phones. Importing it imports no torch."""
