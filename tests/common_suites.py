"""Download the common tests of transformers from its source distribution, and mark expected failures."""

import functools
import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
import unittest
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image


# Modules that these tests import and the source distribution lacks; the last one replaces their downloads.
REPLACEMENTS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "../fetch_hub_objects_for_ci.py": "from common_suites import write_sample_file as url_to_local_path\n",
}
MAPPINGS = {
    "SAILViTModel": ("MODEL_MAPPING_NAMES", "sailvit"),
    "SAILViTBackbone": ("MODEL_FOR_BACKBONE_MAPPING_NAMES", "sailvit"),
    "SAILViTForImageClassification": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "sailvit"),
    "SAILVLForConditionalGeneration": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "sailvl"),
}


SAMPLES = Path(tempfile.mkdtemp(prefix="sailvit-samples-"))


def download_tests(folder: Path) -> Path:
    """Write the common tests of the installed transformers to `folder`/transformers_tests; returns `folder`."""
    version = importlib.metadata.version("transformers")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    subprocess.run([*command, f"transformers=={version}", "--dest", str(folder)], check=True)
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    tests = folder / "transformers_tests"
    (folder / f"transformers-{version}" / "tests").rename(tests)
    (tests / "__init__.py").touch()
    for name, content in REPLACEMENTS.items():
        (tests / name).parent.mkdir(exist_ok=True)
        if not (tests / name).exists():
            (tests / name).write_text(content)
    return folder


def write_sample_file(url: str) -> str:
    """Write a small image or video to a temporary folder, instead of one that a test would download."""
    path = SAMPLES / url.rpartition("/")[2]
    if path.suffix in (".png", ".jpg") and not path.exists():
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    elif path.suffix == ".mp4" and not path.exists():
        with av.open(str(path), "w") as video:
            stream = video.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for level in range(0, 220, 20):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
                video.mux(stream.encode(frame))
            video.mux(stream.encode())
    return str(path)


def register_model_mappings(*model_classes: type) -> None:
    """Register model classes in the mappings of transformers that the mixins read."""
    from transformers.models.auto import modeling_auto

    for model_class in model_classes:
        table, model_type = MAPPINGS[model_class.__name__]
        getattr(modeling_auto, table)[model_type] = model_class.__name__


def expect_failures(failures: Mapping[str, Mapping[str, str]]) -> Callable[[type], type]:
    """Decorator: the tests in `failures` must fail; remove a test from it when it passes."""

    def mark(suite: type) -> type:
        for name, reason in failures[suite.__name__].items():
            expected = pytest.mark.xfail(reason=reason, strict=True)(_without_subtests(getattr(suite, name)))
            setattr(suite, name, expected)
        return suite

    return mark


def _without_subtests(test: Callable) -> Callable:
    """Run a test without subtests: xfail does not see a failing subtest."""

    @functools.wraps(test)
    def run(self: unittest.TestCase, *args: object) -> None:
        self.subTest = lambda *args, **kwargs: nullcontext()
        test(self, *args)

    return run
