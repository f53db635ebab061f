"""
Common tests of transformers (ModelTesterMixin, BackboneTesterMixin, ConfigTester) for the models, at toy size.

Run by tests/test_common_suites.py, which downloads these tests from the source distribution of the installed
transformers. EXPECTED_FAILURES and docs/compatibility.md list the tests that fail, with the reason.
"""

import sys
import unittest
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from common_suites import expect_failures, register_model_mappings
from transformers_tests import test_backbone_common, test_configuration_common, test_modeling_common
from transformers_tests.test_modeling_common import floats_tensor, ids_tensor

from sailvit import (
    SAILViTBackbone,
    SAILViTConfig,
    SAILViTForImageClassification,
    SAILViTModel,
    SAILVLConfig,
    SAILVLForConditionalGeneration,
)


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LANGUAGE = {
    "model_type": "qwen2", "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
IMAGE = 309
FEATURES = "get_image_features returns a tensor unless return_dict=True asks for transformers' output"
EXPECTED_FAILURES = {
    "TowerSuite": {
        "test_get_image_features_attentions": FEATURES,
        "test_get_image_features_hidden_states": FEATURES,
        "test_get_image_features_output_0": FEATURES,
        "test_get_image_features_output_1": FEATURES,
        "test_get_image_features_output_2": FEATURES,
        "test_model_get_set_embeddings": "the input embedding of a vision encoder is a convolution, no nn.Embedding",
    },
    "SAILVLSuite": {
        "test_bc_cache_name_forward": "the cache is taken by either name without a warning",
        "test_config": "the vision encoder's auto_map is written once, for the whole model",
        "test_generation_tester_mixin_inheritance": "GenerationTesterMixin is not in the source distribution",
        "test_get_image_features_attentions": FEATURES,
        "test_get_image_features_hidden_states": FEATURES,
        "test_get_image_features_output_0": FEATURES,
        "test_get_image_features_output_1": FEATURES,
        "test_get_image_features_output_2": FEATURES,
        "test_multimodal_outputs_are_returned": "outputs are the language model's: without image_outputs",
    },
}


class TowerTester:
    """Config and inputs for the mixins: B = 2 tiles of 56 pixels."""

    batch_size, is_training, num_labels = 2, True, 3
    seq_length = encoder_seq_length = key_length = 16
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 2
    num_channels, image_size, patch_size = 3, 56, 14

    def get_config(self) -> SAILViTConfig:
        return SAILViTConfig(**VISION, image_size=self.image_size)

    def prepare_config_and_inputs(self) -> tuple[SAILViTConfig, torch.Tensor]:
        return self.get_config(), floats_tensor([2, 3, 56, 56])

    def prepare_config_and_inputs_for_common(self) -> tuple[SAILViTConfig, dict[str, torch.Tensor]]:
        config, pixel_values = self.prepare_config_and_inputs()
        return config, {"pixel_values": pixel_values}


class SAILVLTester:
    """Config and inputs: B = 2 prompts of 12 tokens, each with one tile of 28 pixels, which is one visual token."""

    batch_size, is_training, vocab_size, image_token_id = 2, True, 384, IMAGE
    seq_length = encoder_seq_length = key_length = 12
    num_hidden_layers, hidden_size, num_attention_heads = 2, 64, 4
    num_channels, image_size = 3, 28

    def get_config(self) -> SAILVLConfig:
        return SAILVLConfig({**VISION, "image_size": 28}, LANGUAGE, image_token_id=IMAGE)

    def prepare_config_and_inputs_for_common(self) -> tuple[SAILVLConfig, dict[str, torch.Tensor]]:
        ids = ids_tensor([2, 12], 300) + 3
        ids[:, 3] = IMAGE
        pixel_values = floats_tensor([2, 3, 28, 28])
        return self.get_config(), {
            "pixel_values": pixel_values,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }


class TextTester(SAILVLTester):
    """Inputs without images: some tests drop the pixels and keep the placeholders, which raises."""

    def prepare_config_and_inputs_for_common(self) -> tuple[SAILVLConfig, dict[str, torch.Tensor]]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, {"input_ids": inputs["input_ids"].clamp(max=300), "attention_mask": inputs["attention_mask"]}


register_model_mappings(SAILViTModel, SAILViTBackbone, SAILViTForImageClassification, SAILVLForConditionalGeneration)


@expect_failures(EXPECTED_FAILURES)
class TowerSuite(test_modeling_common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (SAILViTModel, SAILViTForImageClassification, SAILViTBackbone)
    test_resize_embeddings = False

    def setUp(self) -> None:
        self.model_tester = TowerTester()

    def test_config(self) -> None:
        tester = test_configuration_common.ConfigTester(
            self, config_class=SAILViTConfig, has_text_modality=False, hidden_size=32
        )
        tester.run_common_tests()


class BackboneSuite(test_backbone_common.BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (SAILViTBackbone,)
    config_class = SAILViTConfig
    has_attentions = True

    def setUp(self) -> None:
        self.model_tester = TowerTester()


@expect_failures(EXPECTED_FAILURES)
class SAILVLSuite(test_modeling_common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (SAILVLForConditionalGeneration,)
    _is_composite = True

    def setUp(self) -> None:
        is_text_only = "eager_matches_sdpa_inference" in self._testMethodName
        self.model_tester = TextTester() if is_text_only else SAILVLTester()

    def test_config(self) -> None:
        tester = test_configuration_common.ConfigTester(self, config_class=SAILVLConfig, has_text_modality=False)
        tester.run_common_tests()
