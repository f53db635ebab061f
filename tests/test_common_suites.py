"""Run the common tests of transformers on the classes of this package."""

import ast
import os
import subprocess
import sys

import pytest
from common_suites import download_tests
from conftest import ROOT


SUITES = sorted(path.name for path in (ROOT / "tests" / "suites").glob("*.py"))


@pytest.fixture(scope="module")
def common_tests(tmp_path_factory):
    return download_tests(tmp_path_factory.mktemp("transformers"))


@pytest.mark.nightly
@pytest.mark.parametrize("suite", SUITES)
def test_common_tests_of_transformers_pass(suite, common_tests):
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-rfE", "-W", "ignore", "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, "--rootdir", str(common_tests), str(ROOT / "tests" / "suites" / suite)]
    variables = {**os.environ, "PYTHONPATH": str(common_tests), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=common_tests, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]


def test_compatibility_lists_every_expected_failure():
    """With its reason, verbatim."""
    text = " ".join((ROOT / "docs" / "compatibility.md").read_text().split())
    for suite in SUITES:
        tree = ast.parse((ROOT / "tests" / "suites" / suite).read_text())
        scope: dict = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
                exec(ast.unparse(node), scope)
        for name, tests in scope["EXPECTED_FAILURES"].items():
            for test, reason in tests.items():
                assert f"`{test}`" in text, f"{name}: {test}"
                assert reason in text, f"{name}: {reason}"
