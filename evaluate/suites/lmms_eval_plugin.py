# Copyright 2026 The SAILViT package authors.
# SPDX-License-Identifier: Apache-2.0
"""
The entry point of lmms-eval: the model `sail_vl`.

lmms-eval loads it while it imports its models, so the class itself is in another module.
"""

from lmms_eval.models.registry_v2 import ModelManifest


MANIFEST = ModelManifest("sail_vl", chat_class_path="sailvit.evaluate.suites.lmms_eval_model.SAILVLForLMMsEval")
