"""The same files on the other releases of transformers that the package promises to run on."""

import os
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from importlib.metadata import version as metadata_version
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version


# The releases that the package is tested on; the newest is the one installed here. The oldest runs with the oldest
# Pillow, which resizes in another order; datasets 5 needs a newer client of the Hub than transformers 4 takes.
TESTED = {
    "4.56.2": ["pillow==11.0.0", "einops==0.8.0", "datasets<5"],
    "4.57.6": ["datasets<5"],
    "5.0.0": [],
    "5.4.0": [],
    "5.23.0": [],
    "5.24.0": [],
}
OLDEST = min(TESTED, key=Version)
# Broken in ways of their own: 5.2.0 leaves a missing bias uninitialized, 5.3.0 mistreats tied heads.
REFUSED = ["4.55.4", "5.2.0", "5.3.0"]
# These meet no transformers.
SAME_EVERYWHERE = (
    "test_browser_page.py",
    "test_serve_images.py",
    "test_architecture.py",
    "test_checkpoints.py",
    "test_common_suites.py",
    "test_devices.py",
    "test_estimate.py",
    "test_layouts.py",
    "test_packing.py",
    "test_probe_heads.py",
    "test_recipes.py",
    "test_train_formats.py",
    "test_training_checkpoints.py",
)
# These meet little of it; the oldest release runs without them, for time, the others with them.
LEFT_OUT_OF_THE_OLDEST = (
    "test_cli.py",
    "test_corpus.py",
    "test_data_check.py",
    "test_encode.py",
    "test_estimate.py",
    "test_evaluate_disk.py",
    "test_gpu_benchmark.py",
    "test_hub_push.py",
    "test_hub_source.py",
    "test_inspect.py",
    "test_miniature_arms.py",
    "test_miniature_world.py",
    "test_onnx.py",
    "test_pretraining.py",
    "test_probe.py",
    "test_report.py",
    "test_run.py",
    "test_show.py",
    "test_suites.py",
)


def test_the_tested_releases_are_those_that_are_promised():
    """In setup.cfg, README and docs/compatibility.md."""
    promised = next(
        requirement for line in distribution("sailvit").requires
        if (requirement := Requirement(line)).name == "transformers"
    )  # fmt: skip
    assert all(promised.specifier.contains(version) for version in TESTED)
    assert not any(promised.specifier.contains(version) for version in REFUSED)
    *older, newest = TESTED
    listed = f"{', '.join(older)} and {newest}"
    for file in ("README.md", "docs/compatibility.md"):
        assert listed in " ".join((ROOT / file).read_text().split()), file


@pytest.mark.slow
@pytest.mark.parametrize(
    "version", [OLDEST, *(pytest.param(version, marks=pytest.mark.nightly) for version in TESTED if version != OLDEST)]
)
def test_the_fast_tests_pass_on_transformers(version, tmp_path):
    """In an environment that sees this one's packages, transformers and what it pins excepted."""
    if "SAILVIT_VERSION_RUN" in os.environ:
        pytest.skip("already inside such a run")
    if version == metadata_version("transformers"):
        pytest.skip("the release of this run")
    environment = tmp_path / version
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    below = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (below / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"transformers=={version}"]
    install += TESTED[version]
    subprocess.run(install, check=True)
    command = [python, "-m", "pytest", "-q", "-n0", "-m", "not slow and not nightly", "-p", "no:cacheprovider", "tests"]
    left_out = (*SAME_EVERYWHERE, *(LEFT_OUT_OF_THE_OLDEST if version == OLDEST else ()))
    command += [f"--ignore=tests/{file}" for file in left_out]
    variables = {**os.environ, "SAILVIT_VERSION_RUN": version, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    version_seen = [python, "-c", "import transformers; print(transformers.__version__)"]
    assert subprocess.run(version_seen, capture_output=True, text=True).stdout.strip() == version
