"""Replace the code in a folder that an earlier version of this package wrote; the weights are not touched."""

import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from .export.code_files import CODE_FILES, PACKAGE, is_old_template, is_ours, package_version, read_version
from .export.model_types import auto_class_of
from .export.provenance import versions
from .export.tokenizer_files import generation_settings
from .models.sailvl import verify_sailvl
from .storage.checkpoint import recorded_hashes
from .storage.errors import CheckpointError
from .storage.files import read_json
from .storage.output_folder import sync
from .storage.sources import PROVENANCE
from .verify.outputs import link_or_copy, run_in_clean_process


ONNX_SCRIPT = PACKAGE / "exporters" / "run_folder.py"  # runs an ONNX folder
CONFIG, TEMPLATE, TOKENIZER = "config.json", "chat_template.jinja", "tokenizer_config.json"


@dataclass(frozen=True)
class Refreshed:
    """The result of refresh_code."""

    before: int  # version of the code
    after: int
    files: list[str] = field(default_factory=list)  # that were written
    notes: list[str] = field(default_factory=list)  # what was not changed, and why


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
    old = _Folder(Path(folder))
    before, after = read_version(old.path), package_version()
    if before > after:
        what = f"expected code of version {after} at most, got version {before}"
        raise CheckpointError(f"{folder}: {what}: install a newer package")
    code = {name: (PACKAGE / name).read_bytes() for name in CODE_FILES[old.config["model_type"]]}
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


class _Folder:
    """A folder before it is changed."""

    def __init__(self, path: Path):
        """Raises CheckpointError if it is no folder of this package, or one whose files are links."""
        if not (path / CONFIG).is_file():
            fix = "`hf download NAME --local-dir FOLDER` downloads one from the Hub"
            raise CheckpointError(f"{path}: expected a folder with a config.json: {fix}")
        self.path, self.config = path, read_json(path / CONFIG)
        if not is_ours(self.config):
            raise CheckpointError(f"{path}: auto_map in config.json names no code of this package: nothing to update")
        names = (*CODE_FILES[self.config["model_type"]], CONFIG)
        if linked := [name for name in names if (path / name).is_symlink()]:
            what = f"{linked[0]} is a symbolic link, as in a cache of the Hub, which others use: copy the folder first"
            raise CheckpointError(f"{path}: {what}")
        present = [name for name in (*names, TEMPLATE, TOKENIZER, PROVENANCE) if (path / name).is_file()]
        self.files = {name: (path / name).read_bytes() for name in present}
        self.record = read_json(path / PROVENANCE) if PROVENANCE in self.files else {}
        self.recorded = recorded_hashes(self.record, "files")  # file -> sha256

    def is_unedited(self, name: str) -> bool:
        return name in self.files and sha256(self.files[name]).hexdigest() == self.recorded.get(name)


def _check_unedited(old: _Folder, code: Mapping[str, bytes]) -> None:
    """Raise CheckpointError if a code file is neither as recorded nor this package's."""
    for name, content in code.items():
        if old.files.get(name, content) != content and not old.is_unedited(name):
            why = f"differs from {PROVENANCE}" if name in old.recorded else f"is in no {PROVENANCE}"
            fix = "--overwrite replaces it by this package's"
            raise CheckpointError(f"{old.path / name}: it {why}, so it may have been edited: {fix}")


def _new_settings(old: _Folder) -> tuple[dict[str, bytes], list[str]]:
    """Return name -> new content of the settings next to the code, and notes about those that are not changed."""
    from .. import chat_sailvl, configuration_sailvit, configuration_sailvl

    is_sailvl = old.config["model_type"] == "sailvl"
    classes = (configuration_sailvl if is_sailvl else configuration_sailvit).AUTO_MAP
    config = {**old.config, "auto_map": {**old.config["auto_map"], **classes}}
    new, notes = {} if config == old.config else {CONFIG: _json(config)}, []
    if not is_sailvl:
        return new, notes
    if is_old_template(old.files.get(TEMPLATE, b"").decode("utf-8", "replace")):
        new[TEMPLATE] = chat_sailvl.CHAT_TEMPLATE.encode()
    tokenizer = read_json(old.path / TOKENIZER) if TOKENIZER in old.files else None
    settings = None if tokenizer is None else generation_settings(tokenizer, config.get("image_token", "<IMG_CONTEXT>"))
    if settings != tokenizer and old.is_unedited(TOKENIZER):
        new[TOKENIZER] = _json(settings)
    elif settings != tokenizer:
        notes.append(f"{TOKENIZER} differs from {PROVENANCE}, so it is not changed: set padding_side to left")
    return new, notes


def _new_record(old: _Folder, new: Mapping[str, bytes], before: int, after: int) -> bytes:
    """Return provenance.json with the hashes of the new files; of edited settings, the recorded hash stays."""
    files = dict(old.record.get("files") or {})
    for name, content in new.items():
        if name.endswith(".py") or name == TEMPLATE or old.is_unedited(name):
            files[name] = {"sha256": sha256(content).hexdigest()}
    update = {"refreshed": {"code": {"from": before, "to": after}, "versions": versions()}} if before != after else {}
    return _json({**old.record, "files": files, **update}, indent=1)


def _verify(old: _Folder, new: Mapping[str, bytes]) -> None:
    """Load the folder with the new files in a clean process; the others are linked."""
    with tempfile.TemporaryDirectory() as scratch:
        trial = Path(scratch)
        for path in [path for path in old.path.iterdir() if path.name not in new]:
            link_or_copy(path, trial / path.name)
        for name, content in new.items():
            (trial / name).write_bytes(content)
        if old.config["model_type"] == "sailvl":
            verify_sailvl(trial)
        elif (auto_class := auto_class_of(trial)) == "onnx":
            run_in_clean_process(trial, script=ONNX_SCRIPT, inputs=None)
        else:
            run_in_clean_process(trial, auto_class)


def _replace(old: _Folder, new: Mapping[str, bytes]) -> None:
    """Write all files under temporary names, then rename them; undo it if one fails."""
    parts = {name: old.path / f".{name}.part" for name in {**old.files, **new}}  # others may be left by a kill
    renamed: list[str] = []
    try:
        for name, content in new.items():
            _write(parts[name], content)
        for name in new:
            renamed.append(name)
            parts[name].replace(old.path / name)
    except BaseException:
        for name in renamed:
            if name in old.files:
                _write(parts[name], old.files[name])
                parts[name].replace(old.path / name)
            else:
                (old.path / name).unlink(missing_ok=True)
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
