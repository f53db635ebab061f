"""
The report on stages of training: base model and stages side by side.

`build_report` reads the runs, compares weights, encodes images, and matches the results of probes; `page.py` makes a
page and a Markdown file of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ...convert.storage.files import first_line
from ...convert.storage.sources import without_local_path
from ...convert.storage.training_run import open_checkpoint
from ..datasets import SUFFIXES, decode
from ..pictures import PrincipalColours, fit_image
from ..probe.results import ProbeFindings, match_probes, read_probe
from .runs import Run, find_base, find_gaps, find_runs
from .similarity import EncoderView, compare_encoders
from .weights_change import WeightsChange, weights_change


EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURES = 5
PICTURE_SIDE = 420  # pixels in the page
Log = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """
    What a report shows; lists over models begin with the base.

    Attributes:
        names: Of the models.
        runs: The stages, in order.
        changes: Weights of each run relative to the base.
        views: What each encoder makes of the images.
        images: How many.
        pictures: The first of them, reduced, and their names.
        colours: (models, pictures, rows, columns, 3) uint8: principal components of the tokens, in one basis and range.
        shares: Of the variance that each component has.
        unreadable: Images that were left out, with the reason.
        probe: Results of probes; None without any.
    """

    names: tuple[str, ...]
    runs: tuple[Run, ...]
    changes: tuple[WeightsChange, ...]
    views: tuple[EncoderView, ...]
    images: int
    pictures: tuple[tuple[str, Image.Image], ...]
    colours: torch.Tensor
    shares: tuple[float, float, float]
    unreadable: tuple[str, ...]
    probe: ProbeFindings | None


def build_report(
    paths: Sequence[Path],
    base: str | None = None,
    probes: Sequence[Path] = (),
    images: Path | None = None,
    most_images: int = 64,
    device: str | None = None,
    dtype: str = "float32",
    log: Log = lambda line: None,
) -> Report:
    """
    Compare the models of runs with the one that they began with.

    Args:
        paths: Folders of runs, or folders with such folders.
        base: The model before the first stage; None to find it from the records.
        probes: Folders that `sailvit probe` wrote.
        images: A folder of images, searched with its folders; None for the photograph of the package.
        most_images: So many of them are encoded, evenly spaced in the order of their names.
        device: To encode on; None for a GPU if there is one.
        dtype: To encode in, the same for all models.
        log: Called with each message.

    Raises:
        ValueError: An input cannot be used; the message names it.
    """
    runs = find_runs(paths)
    base = find_base(runs, base)
    names = _names(base, runs)
    contents = {folder: read_probe(folder) for folder in probes}
    files, unreadable = find_images(images or EXAMPLES, most_images)
    for line in unreadable:
        log(f"left out: {line}")
    for line in find_gaps(runs):
        log(f"not among the runs: {line}")
    log(f"base {base}; runs {', '.join(names[1:])}; {len(files)} images")
    before = open_checkpoint(base)
    changes = tuple(weights_change(before, open_checkpoint(str(run.folder))) for run in runs)
    sources = [base, *(str(run.folder) for run in runs)]
    views = tuple(compare_encoders(sources, files, PICTURES, device, dtype, log))
    hashes = {name: view.weights_hash for name, view in zip(names, views, strict=True)}
    probe = match_probes(contents, hashes) if contents else None
    tokens = torch.stack([view.tokens for view in views])
    colours = PrincipalColours.fit(tokens)
    pictures = tuple((file.name, fit_image(decode(file.read_bytes()), PICTURE_SIDE)) for file in files[:PICTURES])
    shown = colours(tokens)
    return Report(names, tuple(runs), changes, views, len(files), pictures, shown, colours.shares, unreadable, probe)


def _names(base: str, runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the names of base and runs; the base is a folder's name or a name on the Hub."""
    return (f"{without_local_path(base)} (base)", *(run.name for run in runs))


def find_images(folder: Path, most: int) -> tuple[list[Path], tuple[str, ...]]:
    """
    Return up to `most` image files of a folder and the folders in it, evenly spaced in order, that can be read; and a
    line for each that cannot.

    Raises:
        ValueError: There is no image that can be read.
    """
    if not folder.is_dir():
        raise ValueError(f"--images {folder}: no such folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    count = min(most, len(found))
    readable, unreadable = [], []
    for path in [found[number * len(found) // count] for number in range(count)]:
        try:
            decode(path.read_bytes())
            readable.append(path)
        except (OSError, ValueError) as error:
            unreadable.append(f"{path.relative_to(folder)}: {first_line(error)}")
    if not readable:
        what = f"none of {count} can be read, such as {unreadable[0]}" if unreadable else "no images"
        raise ValueError(f"--images {folder}: {what}: expected {', '.join(sorted(SUFFIXES))} files")
    return readable, tuple(unreadable)
