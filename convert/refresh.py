"""Replace the code in a folder that an earlier version of this package wrote; the weights are not touched."""

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from .export.code_files import (
    PACKAGE,
    VERSION_FILE,
    code_files,
    is_old_template,
    is_ours,
    package_version,
    read_version,
)
from .export.model_types import auto_class_of
from .export.provenance import versions
from .export.tokenizer_files import generation_settings
from .models.sailvl import verify_sailvl
from .storage.checkpoint import recorded_hashes
from .storage.errors import CheckpointError
from .storage.files import read_json
from .storage.output_folder import sync
from .storage.sources import PROVENANCE
from .verify.outputs import run_in_clean_process


CONFIG, TEMPLATE, TOKENIZER = "config.json", "chat_template.jinja", "tokenizer_config.json"


@dataclass(frozen=True)
class Refreshed:
    """
    The result of refresh_code.

    Attributes:
        before, after: Version of the code that was there, and of the code that is there now.
        files: Names of the written files.
        notes: What was not changed, and why.
    """

    before: int
    after: int
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Folder:
    """
    A folder before it is changed.

    Attributes:
        config, record: config.json; provenance.json, empty if there is none.
        files: Name -> content of the code and of the settings next to it, as far as they exist.
        unedited: Those of the files whose hash is the recorded one.
    """

    path: Path
    config: dict[str, Any]
    record: dict[str, Any]
    files: dict[str, bytes]
    unedited: set[str]


def refresh_code(
    folder: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    log: Callable[[str], None] = lambda message: None,
) -> Refreshed:
    """
    Replace a folder's code by this package's, and update what belongs to it: auto_map in config.json, chat template
    and tokenizer settings where they were not edited, and the hashes in provenance.json. An error leaves all files as
    they were; after a kill, every file is complete, and a second call finishes.

    Args:
        folder: A local folder.
        overwrite: Whether to replace code that was edited, or that provenance.json does not show to be unedited.
        verify: Whether to load the weights with the new files in a clean process first.
        log: Called with each progress message.

    Raises:
        CheckpointError: The folder has no code of this package, a newer version of it, or edited code.
        VerificationError: The folder does not load with the new code; nothing was changed.
    """
    old = _read_folder(Path(folder))
    before, after = read_version(old.files.get(VERSION_FILE, b"").decode("utf-8", "replace")), package_version()
    if before > after:
        fix = "install a newer package"
        raise CheckpointError(f"{folder}: expected code of version {after} at most, got version {before}: {fix}")
    names = sorted(code_files(old.config["model_type"]), key=lambda name: name == VERSION_FILE)  # the version last
    code = {name: (PACKAGE / name).read_bytes() for name in names}
    if not overwrite:
        _check_unedited(old, code)
    settings, notes = _new_settings(old)
    new = settings | code
    if old.record:
        new[PROVENANCE] = _new_record(old, new, before, after)
    changed = {name: content for name, content in new.items() if old.files.get(name) != content}
    if verify and changed:
        _verify(old, changed)
        log("with the new code it loads in a clean process")
    _replace(old, changed)
    for line in [*(f"updated: {name}" for name in changed), *notes]:
        log(line)
    return Refreshed(before, after, [*changed], notes)


def _read_folder(folder: Path) -> _Folder:
    """Raises CheckpointError if it is no folder of this package, or one whose files are links."""
    if not (folder / CONFIG).is_file():
        fix = "`hf download NAME --local-dir FOLDER` downloads one from the Hub"
        raise CheckpointError(f"{folder}: expected a folder with a config.json: {fix}")
    config = read_json(folder / CONFIG)
    if not is_ours(config):
        raise CheckpointError(f"{folder}: auto_map in config.json names no code of this package: nothing to update")
    names = (*code_files(config["model_type"]), CONFIG)
    if linked := [name for name in names if (folder / name).is_symlink()]:
        what = f"{linked[0]} is a symbolic link, as in a cache of the Hub, which others use: copy the folder first"
        raise CheckpointError(f"{folder}: {what}")
    present = [name for name in (*names, TEMPLATE, TOKENIZER, PROVENANCE) if (folder / name).is_file()]
    files = {name: (folder / name).read_bytes() for name in present}
    record = read_json(folder / PROVENANCE) if PROVENANCE in files else {}
    recorded = recorded_hashes(record, "files")
    unedited = {name for name, content in files.items() if sha256(content).hexdigest() == recorded.get(name)}
    return _Folder(folder, config, record, files, unedited)


def _check_unedited(old: _Folder, code: Mapping[str, bytes]) -> None:
    """Raise CheckpointError if a code file is neither as recorded nor this package's."""
    for name, content in code.items():
        if name not in old.unedited and old.files.get(name, content) != content:
            is_recorded = name in recorded_hashes(old.record, "files")
            why = f"differs from {PROVENANCE}" if is_recorded else f"is in no {PROVENANCE}"
            fix = "--overwrite replaces it by this package's"
            raise CheckpointError(f"{old.path / name}: it {why}, so it may have been edited: {fix}")


def _new_settings(old: _Folder) -> tuple[dict[str, bytes], list[str]]:
    """Return name -> new content of the settings next to the code, and notes about those that are not changed."""
    from .. import configuration_sailvit, configuration_sailvl

    is_sailvl = old.config["model_type"] == "sailvl"
    classes = (configuration_sailvl if is_sailvl else configuration_sailvit).AUTO_MAP
    config = {**old.config, "auto_map": {**old.config["auto_map"], **classes}}
    new, notes = {} if config == old.config else {CONFIG: _json(config)}, []
    if not is_sailvl:
        return new, notes
    if is_old_template(old.files.get(TEMPLATE, b"").decode("utf-8", "replace")):
        from ..chat_sailvl import CHAT_TEMPLATE

        new[TEMPLATE] = CHAT_TEMPLATE.encode()
    tokenizer = read_json(old.path / TOKENIZER) if TOKENIZER in old.files else None
    image_token = old.config.get("image_token", "<IMG_CONTEXT>")
    settings = None if tokenizer is None else generation_settings(tokenizer, image_token)
    if settings != tokenizer and TOKENIZER in old.unedited:
        new[TOKENIZER] = _json(settings)
    elif settings != tokenizer:
        notes.append(f"{TOKENIZER} differs from {PROVENANCE}, so it is not changed: set padding_side to left")
    return new, notes


def _new_record(old: _Folder, new: Mapping[str, bytes], before: int, after: int) -> bytes:
    """Return provenance.json with the hashes of the new files; of edited settings, the recorded hash stays."""
    files = dict(old.record.get("files") or {})
    for name, content in new.items():
        if name.endswith(".py") or name == TEMPLATE or name in old.unedited:
            files[name] = {"sha256": sha256(content).hexdigest()}
    update = {"refreshed": {"code": {"from": before, "to": after}, "versions": versions()}} if before != after else {}
    return _json({**old.record, "files": files, **update}, indent=1)


def _verify(old: _Folder, new: Mapping[str, bytes]) -> None:
    """Load a copy of the folder with the new files in a clean process; the others are linked."""
    with tempfile.TemporaryDirectory() as scratch:
        trial = Path(scratch) / "trial"
        trial.mkdir()
        for path in [path for path in old.path.iterdir() if path.name not in new]:
            (trial / path.name).symlink_to(path.resolve())
        for name, content in new.items():
            (trial / name).write_bytes(content)
        if old.config["model_type"] == "sailvl":
            verify_sailvl(trial)
        else:
            run_in_clean_process(trial, auto_class_of(trial))


def _replace(old: _Folder, new: Mapping[str, bytes]) -> None:
    """Write all files under temporary names, then rename them; undo it if one fails."""
    parts = {name: old.path / f".{name}.part" for name in {**old.files, **new}}  # others may be left by a kill
    try:
        for name, content in new.items():
            _write(parts[name], content)
        for name in new:
            parts[name].replace(old.path / name)
    except BaseException:
        for name in new:
            if name not in old.files:
                (old.path / name).unlink(missing_ok=True)
            elif (old.path / name).read_bytes() != old.files[name]:
                _write(parts[name], old.files[name])
                parts[name].replace(old.path / name)
        raise
    finally:
        for part in parts.values():
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)


def _json(content: object, indent: int = 2) -> bytes:
    return (json.dumps(content, indent=indent) + "\n").encode()
