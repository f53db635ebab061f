"""What the pages of this package share: templates, CSS, images in a page, files that appear complete or not at all."""

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image


TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """Return a template of this package with its values, which are escaped; a missing one is an error."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(**values)


def read_template(*names: str) -> Markup:
    """Return CSS or JavaScript of files of the templates, one after the other, as it is."""
    return Markup("".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names))


def data_url(image: Image.Image, kind: str, **options: Any) -> str:
    """Return an image as a data URL, in a format and with options of Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def check_writable(path: Path, option: str) -> None:
    """Raise OSError, before the work, if nothing can be written in the folder of a path, or the nearest that exists."""
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with TemporaryFile(dir=parent):
            pass
    except OSError as error:
        what = "it is a file" if parent.is_file() else error.strerror or str(error)
        raise OSError(f"{option} {path}: cannot be created in {parent}: {what}: name another place") from error


def write_files(contents: Mapping[Path, bytes]) -> None:
    """
    Write files that appear when all are complete, or not at all.

    Raises:
        OSError: The disk is full, or a file cannot be written; earlier files of these names are unchanged.
    """
    parts = {path: path.with_name(f".{path.name}.part") for path in contents}
    try:
        for path, part in parts.items():
            _write(part, contents[path])
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:
        what = error.strerror or str(error)
        raise OSError(f"{path}: cannot be written: {what}: free space, or name another folder") from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
