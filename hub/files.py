"""What may be in a folder that is published, and what may be in its files."""

import getpass
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..convert.export.card import RESULTS
from ..convert.export.sailvl_files import PROCESSOR_FILES
from ..convert.export.tokenizer_files import TOKENIZER_FILES
from ..convert.storage.errors import CheckpointError, Problem
from ..convert.storage.files import read_json
from ..convert.storage.safetensors_io import LONGEST_HEADER
from ..convert.storage.sources import PROVENANCE


CONFIGS = {"config.json", "generation_config.json", PROVENANCE, RESULTS, *PROCESSOR_FILES, *TOKENIZER_FILES}

WEIGHTS = re.compile(r"[\w.-]+\.safetensors(\.index\.json)?")

BESIDE = re.compile(r"README\.md|\.gitattributes|(LICENSE|NOTICE)[\w.-]*|(assets/)?[\w.-]+\.(png|jpe?g|webp|gif|svg)")

# Other files of a model: such as this package or its neighbours write, and nobody by hand.
OLD = re.compile(r"(configuration|modeling|image_processing|processing|video|chat)_\w+\.py|pytorch_model[\w.-]*")

VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"}  # words like any others

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")

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

COMMON_NAMES = {"root", "user", "admin", "ubuntu", "debian", "runner", "jovyan", "nobody", "sailvit", "model", "hub"}

RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


def published_files(folder: Path) -> dict[str, Path]:
    """Name, with slashes -> place of everything in a folder that is published."""
    code = code_files(folder)
    found = {path.relative_to(folder).as_posix(): path for path in _walk(folder)}
    return {name: path for name, path in found.items() if _is_published(name, code)}


def is_model_file(name: str) -> bool:
    """Whether a file in a repository is part of its model, and has to go where the model no longer has it."""
    return name in CONFIGS or bool(WEIGHTS.fullmatch(name) or OLD.fullmatch(name))


def _walk(folder: Path) -> list[Path]:
    return sorted(Path(top) / file for top, _, files in os.walk(folder) for file in files)


def _is_published(name: str, code: Iterable[str]) -> bool:
    return name in CONFIGS or name in code or bool(WEIGHTS.fullmatch(name) or BESIDE.fullmatch(name))


def code_files(folder: Path) -> set[str]:
    """The Python files that the folder's configurations name, and those that these import, there or not."""
    wanted = set()
    for file in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        targets = _json(folder / file).get("auto_map")
        for target in targets.values() if isinstance(targets, Mapping) else ():
            for name in target if isinstance(target, list) else [target]:
                if isinstance(name, str) and "--" not in name:
                    wanted.add(f"{name.split('.')[0]}.py")
    seen: set[str] = set()
    while left := wanted - seen:
        file = left.pop()
        seen.add(file)
        if (folder / file).is_file():
            text = (folder / file).read_text(encoding="utf-8", errors="replace")
            wanted |= {f"{name}.py" for name in RELATIVE_IMPORT.findall(text)}
    return wanted


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.is_file() else {}
    except CheckpointError:  # told by _broken
        return {}


def file_problems(folder: Path, owner: str | None = None) -> list[Problem]:
    """
    What is in a folder that must not leave this machine, or is missing among its code.

    Args:
        owner: The first part of the repository's name, which is no secret.
    """
    published, code = published_files(folder), code_files(folder)
    problems = [
        Problem("stray", path.relative_to(folder).as_posix(), "no file of a published model: remove it")
        for path in _walk(folder)
        if path.relative_to(folder).as_posix() not in published
    ]
    for file in sorted(code - published.keys()):
        problems.append(Problem("code", file, "missing, but the code or auto_map wants it: copy it from the package"))
    for name, path in published.items():
        if not path.is_file():
            problems.append(Problem("file", name, "a link that leads nowhere: put the file there"))
            continue
        if path.is_symlink() and not _is_inside(path.resolve(), folder.resolve()):
            problems.append(Problem("file", name, "a link to a file elsewhere: put the file there, or remove it"))
        problems += _unreadable(name, path)
        problems += _leaks(name, _text_of(path), owner)
    return problems


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file is in a folder, or among the blobs of a cache of the Hub, to which its snapshots are links."""
    return folder in path.parents or path.parent == folder.parents[1] / "blobs"


def _unreadable(name: str, path: Path) -> Iterator[Problem]:
    if name.endswith(".json") and name != RESULTS:
        try:
            read_json(path)
        except CheckpointError as error:
            yield Problem("file", name, str(error).removeprefix(f"{path}: "))


def _text_of(path: Path) -> str:
    """Of weights, what their header says beside the tensors; of any other file, all."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length if length < LONGEST_HEADER else 0)
        try:
            return json.dumps(json.loads(header or b"{}").get("__metadata__", {}))
        except (ValueError, AttributeError):  # told by the doctor
            return ""
    if path.stat().st_size > LONGEST_TEXT:
        return ""
    content = path.read_bytes()
    return content.decode(BYTE_ORDER_MARKS.get(content[:2], "utf-8"), errors="replace")


def _leaks(name: str, text: str, owner: str | None) -> Iterator[Problem]:
    """Secrets, places on this machine, and who uses it; a secret is not repeated."""
    for what, pattern in SECRETS.items():
        if match := re.search(pattern, text):
            line = text.count("\n", 0, match.start()) + 1
            yield Problem("secret", name, f"{what} in line {line}: take it out, and have it revoked")
    if (token := _own_token()) and token in text:
        yield Problem("secret", name, "the token that this machine has for the Hub: take it out, and have it revoked")
    if name in VOCABULARIES or name.endswith(PICTURES):
        return
    for found in _machine_paths(name, text):
        yield Problem("path", name, f"names a place on a machine, {found}: take it out")
    for user in _users() - {owner}:
        if re.search(rf"(?<![\w-]){re.escape(user)}(?![\w-])", text):
            yield Problem("user", name, f"names {user}, who is logged in here: take it out")


def _machine_paths(name: str, text: str) -> list[str]:
    found = [match[0] for match in PATHS.finditer(text)]
    if name.endswith((".json", ".safetensors")):
        found += JSON_PATH.findall(text)
    home = str(Path.home())
    found += [home] if len(home) > 5 and home in text else []
    return sorted(set(found), key=len)[:1]


def _users() -> set[str]:
    """Names by which this machine knows its user, if they are anybody's in particular."""
    try:
        names = {getpass.getuser(), Path.home().name}
    except (OSError, KeyError, ImportError, RuntimeError):
        return set()
    return {name for name in names if len(name) > 3} - COMMON_NAMES


def _own_token() -> str | None:
    from huggingface_hub import get_token

    token = get_token()
    return token if token and len(token) > 7 else None
