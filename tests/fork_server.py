"""
Scripts in clean processes, forked from a server that has imported torch and transformers, but not this package.

A process of its own costs seconds of imports. The server starts with the first script, one per worker.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path


PRELOADED = [
    "torch",
    "torchvision.transforms",
    "transformers.modeling_utils",
    "transformers.models.auto.image_processing_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.modeling_qwen2",
]
ROOT = Path(__file__).parents[1]
OWN_PATHS = (str(ROOT / "tests"), str(ROOT / "benchmarks"))  # importable in tests, not in a process that they start


def run_forked(
    script: str, *arguments: str, folder: Path, env: Mapping[str, str] = os.environ, strict: bool = False
) -> subprocess.CompletedProcess:
    """
    Run a script as `python -c SCRIPT ARGUMENTS` in a folder, without input.

    Args:
        folder: The current directory.
        env: The environment; of the variables that are read at import, only the cache of remote code is set again.
        strict: Whether warnings are errors.
    """
    with start_forked(script, *arguments, folder=folder, env=env, strict=strict) as (process, *outputs):
        process.join(timeout=300)
        if process.exitcode is None:
            process.kill()
            process.join()
        texts = [path.read_text() for path in outputs]
    return subprocess.CompletedProcess([script, *arguments], process.exitcode, *texts)


@contextmanager
def start_forked(
    script: str, *arguments: str, folder: Path, env: Mapping[str, str] = os.environ, strict: bool = False
) -> Iterator[tuple[BaseProcess, Path, Path]]:
    """Start what `run_forked` runs, and terminate it at the end. Yield the process, the files of stdout and stderr."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [f"{scratch}/stdout", f"{scratch}/stderr"]
        for path in outputs:
            Path(path).touch()
        process = context.Process(target=_run, args=(script, arguments, str(folder), dict(env), outputs, strict))
        process.start()
        try:
            yield process, *map(Path, outputs)
        finally:
            process.terminate()
            process.join()


def _run(script: str, arguments: list[str], folder: str, env: dict[str, str], outputs: list[str], strict: bool) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    # multiprocessing copies the path of the tests, in which transformers may have put its cache of remote code.
    foreign = {path for path in sys.path if path in OWN_PATHS or Path(path, "transformers_modules").exists()}
    sys.path[:] = ["", *(path for path in sys.path if path and path not in foreign)]
    if "sailvit" in sys.modules or "transformers" not in sys.modules:
        raise SystemExit("the fork server: expected transformers imported, and not sailvit")
    import transformers.dynamic_module_utils as remote_code

    cache = Path(env.get("HF_HOME", "~/.cache/huggingface"), "modules").expanduser()
    remote_code.HF_MODULES_CACHE = env.get("HF_MODULES_CACHE", str(cache))
    if strict:
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # torch 2.6 leaves a temporary folder to the interpreter
    exec(compile(script, "<string>", "exec"), {"__name__": "__main__"})
