"""Image files, folders and URLs -> the images to encode."""

import os
from collections.abc import Iterable
from pathlib import Path


SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".tif", ".tiff", ".webp"}
LONGEST_NAME = 255 - len(".safetensors.part")  # bytes of a file name, on the usual file systems


def find_images(inputs: Iterable[str]) -> dict[str, str]:
    """
    Return the source of every image -> the name of its output, without suffix.

    Args:
        inputs: Files, URLs, and folders, which are searched recursively; an output has its image's path in the folder.

    Raises:
        ValueError: An input does not exist, a folder has no image, two images have the same output name, or a name
            cannot be a file name.
    """
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for entry in inputs:
        for source, name in _images_of(entry):
            if not name or not name.isprintable() or len(os.fsencode(Path(name).name)) > LONGEST_NAME:
                raise ValueError(f"{source[:120]!a}: tokens cannot be written under the name {name[:120]!a}: rename it")
            if taken.setdefault(name, source) != source:
                raise ValueError(
                    f"{source} and {taken[name]} would both be written as {name}: encode them in two runs, "
                    "to different folders"
                )
            found[source] = name
    return found


def _images_of(entry: str) -> list[tuple[str, str]]:
    """Return the images of one input, each with its output name."""
    path = Path(entry)
    if entry[:8].lower().startswith(("http://", "https://", "file://")):
        return [(entry, entry.split("?")[0].rsplit("/", 1)[-1])]
    if not entry.strip() or not _exists(path):
        raise ValueError(f"{entry[:120]!r}: no such image: expected a file, a folder or a URL (http, https, file)")
    if path.is_file():
        return [(entry, path.name)]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{entry}: no image in this folder ({', '.join(sorted(SUFFIXES))})")
    return [(str(file), str(file.relative_to(path))) for file in files]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a name: a base64 string, for example
        return False
