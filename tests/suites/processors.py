"""
transformers' own common tests (ProcessorTesterMixin, ImageProcessingTestMixin) of the processors, at toy size.

Run by tests/test_common_suites.py, as models.py.
"""

import sys
import unittest
from pathlib import Path
from tempfile import mkdtemp
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

from common_suites import expect_failures
from mllm import write_tokenizer
from transformers import AutoTokenizer
from transformers_tests import test_processing_common

from sailvit import SAILViTImageProcessor, SAILVLProcessor


LEFT = {"ProcessorSuite": {}}
# The image processor refuses a factor that is not positive; a tiny one gives the negative mean that is looked for, too.
test_processing_common.MODALITY_TEST_SPECS["images"]["init_time_kwargs"] = {"do_rescale": True, "rescale_factor": 1e-9}


@expect_failures(LEFT)
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

    # These two give every kind that has a part of the processor, and so no video, to a prompt with every placeholder.

    def test_processor_with_multiple_inputs(self) -> None:
        self.video_token = ""
        super().test_processor_with_multiple_inputs()

    def test_replacement_offsets(self) -> None:
        self.video_token = ""
        super().test_replacement_offsets()
