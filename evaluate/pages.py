"""What the pages of this package share: templates, CSS, images in a page, files that appear at once."""

import base64
import io
import os
from pathlib import Path
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


def write_file(data: bytes, path: Path) -> Path:
    """Write a file that appears complete or not at all; return its path."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        return part.replace(path)
    finally:
        part.unlink(missing_ok=True)
