"""
Labelled images: a folder of class folders, or a data set of the `datasets` library (on disk or on the Hub).

Images are read as the bytes of their files, so that they can be hashed without being decoded.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from ..convert.storage.files import first_line


if TYPE_CHECKING:
    import datasets

SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".tif", ".tiff", ".webp"}
PARQUET = ".parquet"
DATA_FILES = (PARQUET, ".arrow")
SAVED = ("dataset_info.json", "dataset_dict.json")  # of `save_to_disk`: of one data set, of one for each split
TRAIN_SPLITS = ("train", "training")
TEST_SPLITS = ("test", "validation", "val")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label")


@dataclass(frozen=True)
class Skipped:
    """An image, or a file of many, that cannot be read."""

    data: str  # the data set, as the user named it
    image: str
    reason: str


@dataclass
class Group:
    """Images of one file of a data set, or of one folder: chunks of the cache do not cross its borders."""

    images: "Sequence[Path] | datasets.Dataset"
    column: str = ""  # of the image, in a data set
    start: int = 0  # number of its first image in the whole

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Return the name of an image, for messages."""
        if not self.column:
            return str(self.images[index])
        value = self.images[index][self.column] or {}
        return value.get("path") or f"row {self.start + index}"

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file; raises OSError or ValueError if there are none."""
        if not self.column:
            return self.images[index].read_bytes()
        value = self.images[index][self.column]
        if value is None:
            raise ValueError("no image in this row")
        return value["bytes"] if value.get("bytes") is not None else Path(value["path"]).read_bytes()

    def signatures(self, indices: range) -> list[Any]:
        """Return what changes if one of the images may have changed, without reading them."""
        if not self.column:
            return [_signature(self.images[index]) for index in indices]
        files = [_signature(Path(file["filename"])) for file in self.images.cache_files]
        return [self.images._fingerprint, files, self.start, indices.start, indices.stop] if files else []


@dataclass
class LabelledImages:
    """Images with the numbers of their classes."""

    name: str  # as the user named it
    classes: list[str]  # that have images
    labels: list[int]
    groups: list[Group]
    numbered: list[str]  # all classes in the order of their numbers, those without images, too
    skipped: list[Skipped] = field(default_factory=list)  # files of many images that cannot be read

    def __len__(self) -> int:
        return len(self.labels)


def _signature(file: Path) -> list[Any]:
    """Return inode, size and times of a file; the last change of status cannot be set, so new content shows."""
    stat = file.stat()
    return [str(file.absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def decode(content: bytes) -> Image.Image:
    """
    Return an RGB image; transparency is dropped and no EXIF rotation applied, as torchvision's ImageFolder does it.

    Raises:
        ValueError: It is no image, or a truncated or oversized one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about palettes and EXIF
        try:
            with Image.open(io.BytesIO(content)) as image:
                return image.convert("RGB")
        except UnidentifiedImageError as error:  # its message is an address in memory
            raise ValueError("no image, or of a format that Pillow does not read") from error
        except Exception as error:  # Pillow's readers raise almost any on broken files: SyntaxError, struct.error, ...
            raise ValueError(first_line(error)) from error


def hash_content(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def load_images(name: str, training: bool) -> LabelledImages:
    """
    Return the labelled images of a folder or data set.

    Args:
        name: A folder with one folder for each class; a parquet file; a folder with parquet or arrow files, or written
            by `save_to_disk`; or a name on the Hub. `NAME:SPLIT` names a split; the default is train, or for tests test
            or validation.
        training: Whether it is the training set.

    Raises:
        ValueError: There is no such folder, it holds no images, or images or labels cannot be found in it.
    """
    base, _, split = name.rpartition(":") if ":" in name and not Path(name).exists() else (name, "", "")
    folder = Path(base)
    if folder.is_file() and (folder.suffix != PARQUET or split):
        raise ValueError(f"{name}: expected a folder, a parquet file without a split, or a name on the Hub, got a file")
    if folder.is_dir() and not _is_dataset(folder):
        if split:
            raise ValueError(
                f"{name}: class folders have no splits: name the folder of the split, such as {base}/{split}"
            )
        return _load_folder(name, folder)
    if not folder.exists() and (base.startswith((".", "/", "~")) or base.count("/") > 1 or base.endswith("/")):
        raise ValueError(f"{name}: no such folder")
    return _load_dataset(name, base, split, training)


def _load_folder(name: str, folder: Path) -> LabelledImages:
    paths, labels, classes, empty = [], [], [], []
    for entry in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(file for file in entry.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if files:
            labels += [len(classes)] * len(files)
            classes.append(entry.name)
            paths += files
        else:
            empty.append(entry.name)
    if not paths:
        raise ValueError(
            f"{name}: no images: expected a folder for each class, with {', '.join(sorted(SUFFIXES))} files"
        )
    if empty:
        raise ValueError(
            f"{name}: {len(empty)} of {len(classes) + len(empty)} class folders have no images, such as {empty[0]}: "
            "remove these folders, or complete them"
        )
    return LabelledImages(name, classes, labels, [Group(paths)], classes)


# The datasets library


def _is_dataset(folder: Path) -> bool:
    return _is_saved(folder) or any(file.suffix in DATA_FILES for file in (*folder.glob("*"), *folder.glob("data/*")))


def _is_saved(folder: Path) -> bool:
    return any((folder / file).is_file() for file in SAVED)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError('the datasets library is not installed: pip install "sailvit[evaluate]"') from error
    return datasets


def _load_dataset(name: str, base: str, split: str, training: bool) -> LabelledImages:
    tables, skipped = _open_tables(name, base, split, training)
    first = tables[0]
    image, label = _image_column(name, first), _label_column(name, first)
    library, groups, values = _datasets(), [], []
    for table in tables:
        if table.features != first.features:
            raise ValueError(f"{name}: its files have different columns: convert them to one schema")
        groups.append(Group(table.cast_column(image, library.Image(decode=False)), image, len(values)))
        values += list(table[label])
    if not values:
        raise ValueError(f"{name}: no images in the data set")
    numbered, classes, labels = _number_classes(name, first.features[label], values)
    return LabelledImages(name, classes, labels, groups, numbered, skipped)


def _open_tables(name: str, base: str, split: str, training: bool) -> tuple[list["datasets.Dataset"], list[Skipped]]:
    """Return the tables of a data set: one, or one for each local parquet file; unreadable files are skipped."""
    library, folder = _datasets(), Path(base)
    is_saved = _is_saved(folder)
    files = [folder] if folder.is_file() else [] if is_saved else _parquet_files(name, folder, split, training)
    if files:
        return _open_parquet(name, files)
    if not folder.is_dir():
        _check_on_hub(name, base)
    try:
        loaded = library.load_from_disk(base) if is_saved else library.load_dataset(base)
    except Exception as error:  # of many libraries: huggingface_hub, pyarrow, fsspec
        raise ValueError(f"{name}: cannot be loaded as a data set: {first_line(error)}") from error
    if isinstance(loaded, library.DatasetDict):
        loaded = loaded[_choose_split(name, list(loaded), split, training)]
    elif split not in ("", str(loaded.split)):
        raise ValueError(f"{name}: no split {split!r}: this data set is one, without splits: leave :{split} out")
    return [loaded], []


def _check_on_hub(name: str, base: str) -> None:
    """Raise ValueError if the Hub has no such data set, after one request; `datasets` would retry for half a minute."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(base)
    except Exception as error:  # of huggingface_hub and its HTTP client
        what = "no such folder here, and no such data set on the Hub, or it cannot be reached"
        raise ValueError(f"{name}: {what} (HF_HUB_OFFLINE=1 uses downloaded ones): {first_line(error)}") from error


def _parquet_files(name: str, folder: Path, split: str, training: bool) -> list[Path]:
    """Return the parquet files of a split, named as on the Hub: SPLIT-00000-of-00002.parquet; all, if none is."""
    files = sorted(file for pattern in ("*.parquet", "data/*.parquet") for file in folder.glob(pattern))
    if not files:
        return []
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(file.name.split("-")[0].split(".")[0], []).append(file)
    if not {*by_split} & {*TRAIN_SPLITS, *TEST_SPLITS, split}:
        if split:
            raise ValueError(f"{name}: no split {split!r}: expected files named {split}-*.parquet")
        return files
    return by_split[_choose_split(name, list(by_split), split, training)]


def _choose_split(name: str, splits: list[str], split: str, training: bool) -> str:
    wanted = (split,) if split else TRAIN_SPLITS if training else TEST_SPLITS
    found = next((one for one in wanted if one in splits), None)
    if found is None and (split or len(splits) > 1):
        expected = " or ".join(wanted)
        raise ValueError(f"{name}: expected a split {expected}, got {', '.join(splits)}: give NAME:SPLIT")
    return found or splits[0]


def _open_parquet(name: str, files: Iterable[Path]) -> tuple[list["datasets.Dataset"], list[Skipped]]:
    library, tables, skipped = _datasets(), [], []
    for file in files:
        try:
            tables.append(library.Dataset.from_parquet(str(file)))
        except Exception as error:  # of pyarrow, wrapped by datasets
            skipped.append(Skipped(name, str(file), f"unreadable parquet file: {first_line(error.__cause__ or error)}"))
    if not tables:
        raise ValueError(f"{name}: no parquet file can be read: {skipped[0].image}: {skipped[0].reason}")
    return tables, skipped


def _image_column(name: str, table: "datasets.Dataset") -> str:
    def is_image(feature: Any) -> bool:  # files that `datasets` did not write have maps of bytes and path
        return isinstance(feature, _datasets().Image) or (isinstance(feature, dict) and {*feature} == {"bytes", "path"})

    found = [key for key, value in table.features.items() if is_image(value)]
    if len(found) != 1:
        raise ValueError(f"{name}: expected one column of images, got {found or list(table.features)}")
    return found[0]


def _label_column(name: str, table: "datasets.Dataset") -> str:
    labels = [key for key, value in table.features.items() if isinstance(value, _datasets().ClassLabel)]
    found = labels if len(labels) == 1 else [key for key in LABEL_COLUMNS if key in table.features]
    if not found:
        raise ValueError(f"{name}: expected a column {', '.join(LABEL_COLUMNS)}, got {', '.join(table.features)}")
    return found[0]


def _number_classes(name: str, feature: Any, values: list[Any]) -> tuple[list[str], list[str], list[int]]:
    """Return all classes by number, those that have images, and the number of each image's class among the latter."""
    if any(value is None or value == -1 for value in values):
        raise ValueError(f"{name}: images without a label (-1 or null): give a split that has labels, as NAME:SPLIT")
    distinct = sorted({*values})
    numbers = {value: index for index, value in enumerate(distinct)}
    labels = [numbers[value] for value in values]
    if not isinstance(feature, _datasets().ClassLabel):
        classes = [str(value) for value in distinct]
        return classes, classes, labels
    return feature.names, [feature.names[value] for value in distinct], labels


# Training and test set


def check_apart(train: LabelledImages, test: LabelledImages) -> None:
    """Raise ValueError if a test set has files of the training set, such as the only split of a data set."""
    files = set(_files(test))
    shared = next((file for file in _files(train) if file in files), None)
    if shared:
        raise ValueError(
            f"{test.name}: {shared} is in the training set {train.name}, too: expected a test set of other images; "
            "NAME:SPLIT names a split"
        )


def _files(images: LabelledImages) -> Iterator[str]:
    """Yield the absolute paths of image files, or of the files of a data set."""
    for group in images.groups:
        found = [file["filename"] for file in group.images.cache_files] if group.column else group.images
        yield from map(os.path.abspath, found)


def match_classes(train: LabelledImages, test: LabelledImages) -> tuple[list[int], list[int]]:
    """
    Return the labels of a test set in the numbers of the training set's classes, and the classes that it has.

    Names that are numbers, as ImageNet-V2's, are numbers of the training set's classes (positions in its sorted
    folders, or labels of a data set), unless its names are numbers, too.

    Raises:
        ValueError: The training set has one class, or lacks one of the test set.
    """
    if len(train.classes) < 2:
        raise ValueError(f"{train.name}: expected at least two classes, got {train.classes[0]!r} alone")
    numbers = {name: number for number, name in enumerate(train.classes)}
    used = sorted(test.classes)
    if all(name.isdecimal() for name in used) and not any(name.isdecimal() for name in numbers):
        ordered = train.numbered
        names = {name: ordered[int(name)] if int(name) < len(ordered) else name for name in used}
    else:
        names = {name: name for name in used}
    unknown = [name for name in used if names[name] not in numbers]
    if unknown:
        example = min(numbers)
        raise ValueError(
            f"{test.name}: {len(unknown)} of {len(used)} classes are not in {train.name}, such as {unknown[0]!r} "
            f"(there: {example!r}): name the folders alike"
        )
    labels = [numbers[names[test.classes[label]]] for label in test.labels]
    return labels, sorted({*labels})
