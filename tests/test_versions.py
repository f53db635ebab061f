"""The same files on the other releases of transformers that the package promises to run on."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT


# The newest release is the one installed here. The oldest runs with the oldest Pillow, which resizes in another order.
OLDER = {"4.56.2": ["pillow==11.0.0", "einops==0.8.0"], "4.57.6": [], "5.0.0": [], "5.4.0": []}
# These meet no transformers.
SAME_EVERYWHERE = ("test_checkpoints.py", "test_trained.py")


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("version", OLDER)
def test_the_fast_tests_pass_on_transformers(version, tmp_path):
    """In an environment that sees this one's packages, transformers and what it pins excepted."""
    if "SAILVIT_VERSION_RUN" in os.environ:
        pytest.skip("already inside such a run")
    environment = tmp_path / version
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    below = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (below / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"transformers=={version}"]
    install += OLDER[version]
    subprocess.run(install, check=True)
    command = [python, "-m", "pytest", "-q", "-n0", "-m", "not slow", "-p", "no:cacheprovider", "tests"]
    command += [f"--ignore=tests/{file}" for file in SAME_EVERYWHERE]
    variables = {**os.environ, "SAILVIT_VERSION_RUN": version, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    version_seen = [python, "-c", "import transformers; print(transformers.__version__)"]
    assert subprocess.run(version_seen, capture_output=True, text=True).stdout.strip() == version
