"""The files of a folder that are published, and their forbidden contents."""

import getpass
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..convert.export.card import RESULTS
from ..convert.export.sailvl_files import PROCESSOR_FILES
from ..convert.export.tokenizer_files import TOKENIZER_FILES
from ..convert.storage.errors import CheckpointError, Problem
from ..convert.storage.files import read_json
from ..convert.storage.sources import PROVENANCE
from ..convert.storage.training_record import TRAINING


CONFIGS = {
    "config.json", "generation_config.json", PROVENANCE, TRAINING, RESULTS, *PROCESSOR_FILES, *TOKENIZER_FILES,
}  # fmt: skip
WEIGHTS = re.compile(r"[\w.-]+\.safetensors(\.index\.json)?|onnx/model(_fp16|_quantized)?\.onnx(_data)?")
OTHERS = re.compile(r"README\.md|\.gitattributes|(LICENSE|NOTICE)[\w.-]*|(assets/)?[\w.-]+\.(png|jpe?g|webp|gif|svg)")
# In a repository: code and weights of an earlier model, by the names that tools give them.
GENERATED = re.compile(r"(configuration|modeling|image_processing|processing|video|chat)_\w+\.py|pytorch_model[\w.-]*")

VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"}  # any word may be there
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
LONGEST_TEXT = 1 << 26  # bytes
BYTE_ORDER_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}

SECRETS = {
    "a token of the Hub": r"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}",
    "a token of GitHub": r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}",
    "a token of GitLab": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{24,}|\bAIza[A-Za-z0-9_-]{35}|\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "an access key of AWS": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a bearer token": r"[Bb]earer\s+[A-Za-z0-9._-]{24,}",
    "a password in an address": r"\b[a-z]+://[^\s/:@\"']+:[^\s/@\"']+@",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
ROOTS = "home|root|Users|mnt|media|data|tmp|var|opt|srv|scratch|work|workspace|nfs|gpfs|lustre|private|content|kaggle"
PATHS = re.compile(
    rf"(?<![\w/:.~%$)<-])/(?!path/to/|usr/)(?:(?:{ROOTS})/[\w.+-]+|[\w.+-]+(?:/[\w.+-]+){{2,}})"
    r"|\b(?:file|s3|gs|hdfs|oss|tos|nfs|smb)://[\w/.~%-]\S*"
    r"|(?<![\w])[A-Za-z]:\\{1,2}[\w .-]+\\{1,2}\w"
)
JSON_PATH = re.compile(r'"(/[\w.+-]+(?:/[\w.+ -]+)+/?)"')
COMMON_USERS = {"root", "user", "admin", "ubuntu", "debian", "runner", "jovyan", "nobody", "sailvit", "model", "hub"}
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


def published_files(folder: Path) -> dict[str, Path]:
    """Return name in the repository -> path of all files in a folder that are published."""
    names, files = CONFIGS | code_files(folder), _all_files(folder).items()
    return {name: path for name, path in files if name in names or WEIGHTS.fullmatch(name) or OTHERS.fullmatch(name)}


def is_model_file(name: str) -> bool:
    """Return whether a file in a repository is part of its model, to be deleted where the folder has none."""
    return name in CONFIGS or bool(WEIGHTS.fullmatch(name) or GENERATED.fullmatch(name))


def _all_files(folder: Path) -> dict[str, Path]:
    paths = sorted(Path(top) / file for top, _, files in os.walk(folder) for file in files)
    return {path.relative_to(folder).as_posix(): path for path in paths}


def code_files(folder: Path) -> set[str]:
    """Return the Python files that the folder's configs name, and those that these import, present or not."""
    found: list[str] = []
    for file in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        with suppress(CheckpointError):  # reported by file_problems
            auto_map = read_json(folder / file).get("auto_map") if (folder / file).is_file() else None
            for classes in auto_map.values() if isinstance(auto_map, Mapping) else ():
                names = classes if isinstance(classes, list) else [classes]
                found += [f"{name.split('.')[0]}.py" for name in names if isinstance(name, str) and "--" not in name]
    for file in found:  # which grows
        if (folder / file).is_file():
            text = (folder / file).read_text(encoding="utf-8", errors="replace")
            found += {f"{name}.py" for name in RELATIVE_IMPORT.findall(text)} - {*found}
    return {*found}


def file_problems(folder: Path, owner: str | None = None) -> list[Problem]:
    """
    Return files and contents that must not be published, and code that is missing.

    Args:
        owner: The first part of the repository's name, which may be in the files.
    """
    published, code = published_files(folder), code_files(folder)
    strays = [name for name in _all_files(folder) if name not in published]
    problems = [Problem("stray", name, "not a file of a published model: remove it") for name in strays]
    for file in sorted(code - published.keys()):
        problems.append(Problem("code", file, "missing, but auto_map or other code needs it: copy it from the package"))
    for name, path in published.items():
        wrong = _wrong_file(name, path, folder.resolve(), owner)
        problems += [Problem(kind, name, message) for kind, message in wrong]
    return problems


def _wrong_file(name: str, path: Path, folder: Path, owner: str | None) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        yield "file", "a broken link: replace it by the file"
        return
    # The files of a snapshot in a Hub cache link to the blobs there.
    target = path.resolve()
    if path.is_symlink() and folder not in target.parents and target.parent != folder.parent.parent / "blobs":
        yield "file", "a link to a file elsewhere: replace it by the file, or remove it"
    if name.endswith(".json") and name != RESULTS:
        try:
            read_json(path)
        except CheckpointError as error:
            yield "file", str(error).removeprefix(f"{path}: ")
    yield from _leaks(name, _text_of(path), owner)


def _text_of(path: Path) -> str:
    """Return the text of a file; of safetensors the metadata, of ONNX none: this package writes no paths there."""
    if path.suffix == ".safetensors":
        with suppress(SafetensorError), safe_open(path, "np") as file:  # reported by inspect_checkpoint
            return json.dumps(file.metadata())
        return ""
    if path.suffix in (".onnx", ".onnx_data") or path.stat().st_size > LONGEST_TEXT:
        return ""
    content = path.read_bytes()
    return content.decode(BYTE_ORDER_MARKS.get(content[:2], "utf-8"), errors="replace")


def _leaks(name: str, text: str, owner: str | None) -> Iterator[tuple[str, str]]:
    """Secrets, which are not repeated, local paths, and user names."""
    from huggingface_hub import get_token

    for what, pattern in SECRETS.items():
        if match := re.search(pattern, text):
            line = text.count("\n", 0, match.start()) + 1
            yield "secret", f"{what} in line {line}: remove and revoke it"
    if (token := get_token()) and len(token) > 7 and token in text:
        yield "secret", "the token that this machine has for the Hub: remove and revoke it"
    if name in VOCABULARIES or name.endswith(IMAGES):
        return
    home = str(Path.home())
    paths = [match[0] for match in PATHS.finditer(text)] + ([home] if len(home) > 5 and home in text else [])
    paths += JSON_PATH.findall(text) if name.endswith((".json", ".safetensors")) else []
    if paths:
        yield "path", f"names a local path, {min(paths, key=len)}: remove it"
    for user in _users() - {owner}:
        if re.search(rf"(?<![\w-]){re.escape(user)}(?![\w-])", text):
            yield "user", f"names {user}, the user of this machine: remove it"


def _users() -> set[str]:
    """Return the names of the user of this machine, unless many machines have such a user."""
    names: set[str] = set()
    with suppress(OSError, KeyError, ImportError, RuntimeError):
        names = {getpass.getuser(), Path.home().name}
    return {name for name in names if len(name) > 3} - COMMON_USERS
