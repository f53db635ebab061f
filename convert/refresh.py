"""New code for a folder that an earlier version of this package wrote, in place; its weights are not touched."""

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
from .export.tokenizer_files import generation_settings
from .models.sailvl import verify_all
from .storage.errors import CheckpointError
from .storage.files import read_json
from .storage.hashes import recorded_hashes
from .storage.sources import PROVENANCE
from .verify.outputs import run_in_clean_process


CONFIG, TEMPLATE, TOKENIZER = "config.json", "chat_template.jinja", "tokenizer_config.json"


@dataclass(frozen=True)
class Refreshed:
    """
    What was done.

    Attributes:
        before: The version of the code that was there.
        after: That of the code which is there now.
        files: Names of the files that were written.
        notes: What was left as it is, and why.
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
    log: Callable[[str], None] = lambda line: None,
) -> Refreshed:
    """
    Puts this package's code into a folder that has an earlier version's, with what has to go with it: auto_map in
    config.json, the prompt and the tokenizer's settings, where these are as they were written, and the hashes in
    provenance.json. Each file is whole at any moment, and what fails leaves all of them as they were; what a kill
    interrupts is finished by calling it again.

    Args:
        folder: On this machine.
        overwrite: Whether code that was edited, or of which nothing says that it was not, may be replaced.
        verify: Whether the new files are loaded with the folder's weights in a fresh process before they are put there.
        log: Called with each progress message.

    Raises:
        CheckpointError: The folder has no code of this package, a newer version of it, or edited code.
        VerificationError: The folder would not load with the new code; nothing was changed.
    """
    folder = Path(folder)
    config, record = _read_folder(folder)
    before, after = read_version(_text(folder / VERSION_FILE)), package_version()
    if before > after:
        what = f"its code is of version {before}, this package's of {after}: install a newer package"
        raise CheckpointError(f"{folder}: {what}")
    new, recorded = _new_code(config), recorded_hashes(record, "files")
    if not overwrite:
        _check_unedited(folder, new, recorded)
    settings, notes = _new_settings(folder, config, recorded)
    new = {**settings, **new}
    if record:
        new[PROVENANCE] = _new_record(folder, record, new, before, after)
    for name in new:  # what a kill has left
        _part(folder, name).unlink(missing_ok=True)
    changed = {name: content for name, content in new.items() if _bytes(folder / name) != content}
    if verify and changed:
        log(_verify(folder, config, changed))
    _replace(folder, changed)
    for line in [*(f"renewed: {name}" for name in changed), *notes]:
        log(line)
    return Refreshed(before, after, [*changed], notes)


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and provenance.json, the latter empty if there is none."""
    if not folder.is_dir() or not (folder / CONFIG).is_file():
        what = "no folder with a config.json here: `hf download NAME --local-dir FOLDER` gets one from the Hub"
        raise CheckpointError(f"{folder}: {what}")
    config = read_json(folder / CONFIG)
    if not is_ours(config):
        raise CheckpointError(f"{folder}: config.json names no code of this package (auto_map), so none can be renewed")
    linked = [name for name in (*code_files(config["model_type"]), CONFIG) if (folder / name).is_symlink()]
    if linked:
        what = f"{linked[0]} is a link, as in a cache of the Hub, which others use: give a copy of the folder"
        raise CheckpointError(f"{folder}: {what}")
    return config, read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}


def _new_code(config: Mapping[str, Any]) -> dict[str, bytes]:
    """Name -> content; last the file that says the version, so that an older one is not forgotten half-way."""
    names = sorted(code_files(config["model_type"]), key=lambda name: name == VERSION_FILE)
    return {name: (PACKAGE / name).read_bytes() for name in names}


def _check_unedited(folder: Path, code: Mapping[str, bytes], recorded: Mapping[str, str]) -> None:
    """
    Raises:
        CheckpointError: A file of the folder's code is neither what is recorded nor what would take its place.
    """
    for name, content in code.items():
        found = _bytes(folder / name)
        if found is None or found == content or _hash(found) == recorded.get(name):
            continue
        why = f"is not what {PROVENANCE} recorded" if name in recorded else f"is in no {PROVENANCE}"
        what = f"it {why}, so it may have been edited: --overwrite replaces it by this package's"
        raise CheckpointError(f"{folder / name}: {what}")


def _new_settings(
    folder: Path, config: Mapping[str, Any], recorded: Mapping[str, str]
) -> tuple[dict[str, bytes], list[str]]:
    """Files beside the code -> their new content; and what is to be said of those that stay."""
    new, notes, auto_map = {}, [], _new_auto_map(config)
    if auto_map != config["auto_map"]:
        new[CONFIG] = _json({**config, "auto_map": auto_map})
    if config["model_type"] == "sailvit":
        return new, notes
    template, tokenizer = _bytes(folder / TEMPLATE), _bytes(folder / TOKENIZER)
    if template is not None and is_old_template(template.decode("utf-8", "replace")):
        from ..chat_sailvl import CHAT_TEMPLATE

        new[TEMPLATE] = CHAT_TEMPLATE.encode()
    old = read_json(folder / TOKENIZER) if tokenizer is not None else {}
    marked = generation_settings(old, config.get("image_token", "<IMG_CONTEXT>"))
    if tokenizer is not None and marked != old:
        if _hash(tokenizer) == recorded.get(TOKENIZER):
            new[TOKENIZER] = _json(marked)
        else:
            notes.append(f"{TOKENIZER} is not what {PROVENANCE} recorded, so it is left as it is: let it pad left")
    return new, notes


def _new_auto_map(config: Mapping[str, Any]) -> dict[str, Any]:
    """With this package's classes; what else is named stays."""
    if config["model_type"] == "sailvl":
        from ..configuration_sailvl import AUTO_MAP
    else:
        from ..configuration_sailvit import AUTO_MAP
    return {**config["auto_map"], **AUTO_MAP}


def _new_record(folder: Path, record: Mapping[str, Any], new: Mapping[str, bytes], before: int, after: int) -> bytes:
    """provenance.json with the hashes of what is new; of a file that was edited, the recorded one stays."""
    files, recorded = dict(record.get("files") or {}), recorded_hashes(record, "files")
    for name, content in new.items():
        is_as_recorded = _hash(_bytes(folder / name) or b"") == recorded.get(name)
        if name.endswith(".py") or name == TEMPLATE or is_as_recorded:
            files[name] = {"sha256": _hash(content)}
    said = {**record, "files": files}
    if before != after:
        said["refreshed"] = {"code": {"from": before, "to": after}, "versions": versions()}
    return (json.dumps(said, indent=1) + "\n").encode()


def _verify(folder: Path, config: Mapping[str, Any], new: Mapping[str, bytes]) -> str:
    """Loads the folder as it would be, by links to what stays, in a fresh process."""
    with tempfile.TemporaryDirectory() as scratch:
        trial = Path(scratch) / "trial"
        trial.mkdir()
        for path in folder.iterdir():
            if path.name not in new:
                (trial / path.name).symlink_to(path.resolve())
        for name, content in new.items():
            (trial / name).write_bytes(content)
        if config["model_type"] == "sailvl":
            verify_all(trial)
        else:
            run_in_clean_process(trial)
    return "with the new code it loads in a fresh process"


def _replace(folder: Path, new: Mapping[str, bytes]) -> None:
    """Puts files in their places, once all of them are written; or none."""
    parts = {name: _part(folder, name) for name in new}
    old = {name: _bytes(folder / name) for name in new}
    done: list[str] = []
    try:
        for name, content in new.items():
            _write(parts[name], content)
        for name, part in parts.items():
            done.append(name)
            part.replace(folder / name)
    except BaseException:
        for name in done:
            if old[name] is None:
                (folder / name).unlink(missing_ok=True)
            elif _bytes(folder / name) != old[name]:
                _write(parts[name], old[name])
                parts[name].replace(folder / name)
        raise
    finally:
        for part in parts.values():
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _part(folder: Path, name: str) -> Path:
    """Where a file is written, before it is put in its place."""
    return folder / f".{name}.part"


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _json(content: object) -> bytes:
    """As write_json writes it."""
    return (json.dumps(content, indent=2) + "\n").encode()


def _hash(content: bytes) -> str:
    return sha256(content).hexdigest()


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _text(path: Path) -> str:
    return (_bytes(path) or b"").decode("utf-8", "replace")
