"""Replaces the code in a folder that an earlier version of this package wrote; the weights are not touched."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from .export.code_files import MARK as VERSION_FILE
from .export.code_files import PACKAGE, code_files, is_old_template, is_ours, package_version, read_version
from .export.provenance import versions
from .models.internlm2_tokenizer import generation_settings
from .models.sailvl import verify_sailvl
from .storage.errors import CheckpointError
from .storage.files import read_json
from .storage.hashes import recorded_hashes
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
    folder = Path(folder)
    config, record = _read_folder(folder)
    before, after = read_version((_read(folder / VERSION_FILE) or b"").decode("utf-8", "replace")), package_version()
    if before > after:
        fix = "install a newer package"
        raise CheckpointError(f"{folder}: expected code of version {after} at most, got version {before}: {fix}")
    recorded = recorded_hashes(record, "files")
    names = sorted(
        code_files(config["model_type"]), key=lambda name: name == VERSION_FILE
    )  # the version is written last
    code = {name: (PACKAGE / name).read_bytes() for name in names}
    if not overwrite:
        _check_unedited(folder, code, recorded)
    new, notes = _new_settings(folder, config, recorded)
    new |= code
    if record:
        new[PROVENANCE] = _new_record(folder, record, new, before, after)
    for name in new:  # left by a kill
        _part(folder, name).unlink(missing_ok=True)
    changed = {name: content for name, content in new.items() if _read(folder / name) != content}
    if verify and changed:
        _verify(folder, config, changed)
        log("with the new code it loads in a clean process")
    _replace(folder, changed)
    for line in [*(f"updated: {name}" for name in changed), *notes]:
        log(line)
    return Refreshed(before, after, [*changed], notes)


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config.json and provenance.json, the latter empty if there is none."""
    if not (folder / CONFIG).is_file():
        fix = "`hf download NAME --local-dir FOLDER` downloads one from the Hub"
        raise CheckpointError(f"{folder}: expected a folder with a config.json: {fix}")
    config = read_json(folder / CONFIG)
    if not is_ours(config):
        raise CheckpointError(f"{folder}: auto_map in config.json names no code of this package: nothing to update")
    linked = [name for name in (*code_files(config["model_type"]), CONFIG) if (folder / name).is_symlink()]
    if linked:
        what = f"{linked[0]} is a symbolic link, as in a cache of the Hub, which others use: copy the folder first"
        raise CheckpointError(f"{folder}: {what}")
    return config, read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}


def _check_unedited(folder: Path, code: Mapping[str, bytes], recorded: Mapping[str, str]) -> None:
    """Raise CheckpointError if a code file is neither as recorded nor this package's."""
    for name, content in code.items():
        stored = _read(folder / name)
        if stored not in (None, content) and _hash(stored) != recorded.get(name):
            why = f"differs from {PROVENANCE}" if name in recorded else f"is in no {PROVENANCE}"
            fix = "--overwrite replaces it by this package's"
            raise CheckpointError(f"{folder / name}: it {why}, so it may have been edited: {fix}")


def _new_settings(
    folder: Path, config: Mapping[str, Any], recorded: Mapping[str, str]
) -> tuple[dict[str, bytes], list[str]]:
    """Return name -> new content of the settings next to the code, and notes about those that are not changed."""
    new, notes, auto_map = {}, [], _new_auto_map(config)
    if auto_map != config["auto_map"]:
        new[CONFIG] = _json({**config, "auto_map": auto_map})
    if config["model_type"] == "sailvit":
        return new, notes
    template, tokenizer = _read(folder / TEMPLATE), _read(folder / TOKENIZER)
    if template is not None and is_old_template(template.decode("utf-8", "replace")):
        from ..chat_sailvl import CHAT_TEMPLATE

        new[TEMPLATE] = CHAT_TEMPLATE.encode()
    old = read_json(folder / TOKENIZER) if tokenizer is not None else {}
    settings = generation_settings(old, config.get("image_token", "<IMG_CONTEXT>"))
    if tokenizer is not None and settings != old:
        if _hash(tokenizer) == recorded.get(TOKENIZER):
            new[TOKENIZER] = _json(settings)
        else:
            notes.append(f"{TOKENIZER} differs from {PROVENANCE}, so it is not changed: set padding_side to left")
    return new, notes


def _new_auto_map(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return auto_map with this package's classes; other entries stay."""
    if config["model_type"] == "sailvl":
        from ..configuration_sailvl import AUTO_MAP
    else:
        from ..configuration_sailvit import AUTO_MAP
    return {**config["auto_map"], **AUTO_MAP}


def _new_record(folder: Path, record: Mapping[str, Any], new: Mapping[str, bytes], before: int, after: int) -> bytes:
    """Return provenance.json with the hashes of the new files; of edited settings, the recorded hash stays."""
    files, recorded = dict(record.get("files") or {}), recorded_hashes(record, "files")
    for name, content in new.items():
        is_as_recorded = _hash(_read(folder / name) or b"") == recorded.get(name)
        if name.endswith(".py") or name == TEMPLATE or is_as_recorded:
            files[name] = {"sha256": _hash(content)}
    update = {"refreshed": {"code": {"from": before, "to": after}, "versions": versions()}} if before != after else {}
    return _json({**record, "files": files, **update}, indent=1)


def _verify(folder: Path, config: Mapping[str, Any], new: Mapping[str, bytes]) -> None:
    """Load a copy of the folder with the new files in a clean process; the others are linked."""
    with tempfile.TemporaryDirectory() as scratch:
        trial = Path(scratch) / "trial"
        trial.mkdir()
        for path in folder.iterdir():
            if path.name not in new:
                (trial / path.name).symlink_to(path.resolve())
        for name, content in new.items():
            (trial / name).write_bytes(content)
        if config["model_type"] == "sailvl":
            verify_sailvl(trial)
        else:
            run_in_clean_process(trial)


def _replace(folder: Path, new: Mapping[str, bytes]) -> None:
    """Write all files under temporary names, then rename them; undo it if one fails."""
    old = {name: _read(folder / name) for name in new}
    try:
        for name, content in new.items():
            _write_part(folder, name, content)
        for name in new:
            _part(folder, name).replace(folder / name)
    except BaseException:
        for name, content in old.items():
            if content is None:
                (folder / name).unlink(missing_ok=True)
            elif _read(folder / name) != content:
                _write_part(folder, name, content)
                _part(folder, name).replace(folder / name)
        raise
    finally:
        for name in new:
            with suppress(OSError):
                _part(folder, name).unlink(missing_ok=True)


def _part(folder: Path, name: str) -> Path:
    return folder / f".{name}.part"


def _write_part(folder: Path, name: str, content: bytes) -> None:
    with _part(folder, name).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _json(content: object, indent: int = 2) -> bytes:
    return (json.dumps(content, indent=indent) + "\n").encode()


def _hash(content: bytes) -> str:
    return sha256(content).hexdigest()


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
