"""
Common tests of transformers (ProcessorTesterMixin, ImageProcessingTestMixin) for the processors, at toy size.

Run by tests/test_common_suites.py, like models.py.
"""

import sys
import unittest
from pathlib import Path
from tempfile import mkdtemp
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

from common_suites import expect_failures
from toy_sailvl import write_tokenizer
from transformers import AutoTokenizer
from transformers_tests import test_image_processing_common, test_processing_common

from sailvit import SAILViTImageProcessor, SAILVLProcessor


RGB = "images are always converted to RGB: there is no option do_convert_rgb"
EXPECTED_FAILURES = {
    "ImageProcessorSuite": {
        "test_call_numpy_4_channels": RGB,
        "test_image_processor_from_dict_with_kwargs_has_attributes": RGB,
    },
}
# rescale_factor must be positive; a tiny one also gives the negative mean that the test expects.
test_processing_common.MODALITY_TEST_SPECS["images"]["init_time_kwargs"] = {"do_rescale": True, "rescale_factor": 1e-9}


class ProcessorSuite(test_processing_common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = SAILVLProcessor
    videos_input_name = "pixel_values"

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return AutoTokenizer.from_pretrained(write_tokenizer(Path(mkdtemp()) / "tokenizer"))

    @classmethod
    def _setup_image_processor(cls) -> SAILViTImageProcessor:
        return SAILViTImageProcessor(size=56, max_tiles=4)

    @staticmethod
    def prepare_processor_dict() -> dict[str, int]:
        return {"image_seq_length": 2}

    # These two tests pass no videos, since the processor has no video component, but a prompt with every placeholder.

    def test_processor_with_multiple_inputs(self) -> None:
        self.video_token = ""
        super().test_processor_with_multiple_inputs()

    def test_replacement_offsets(self) -> None:
        self.video_token = ""
        super().test_replacement_offsets()


class ImageTester(test_image_processing_common.ImageProcessingTester):
    """One tile of 20 x 18 pixels per image, as the mixin expects."""

    def __init__(self, parent: unittest.TestCase, **kwargs: Any):
        options = {"size": {"height": 18, "width": 20}, "do_tile": False, "do_normalize": True}
        statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}
        super().__init__(parent, **{**options, **statistics, **kwargs})

    def _get_image_processing_classes(self) -> dict[str, type]:
        return {"torchvision": SAILViTImageProcessor}


@expect_failures(EXPECTED_FAILURES)
class ImageProcessorSuite(test_image_processing_common.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageTester
    test_cast_dtype = True
