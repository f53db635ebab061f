"""Results of `sailvit probe`, matched by the hashes of weights to the models of a report."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...convert.storage.files import read_json
from ...convert.storage.sources import without_local_path
from .files import HEADS, RESULTS, chosen_layers


Entry = Mapping[str, Any]
SECTIONS = {"settings": dict, "results": list, "layers": list, "heads": list, "skipped": list}

# Images and classes -> test set of the paper. It has four.
PAPER_TESTS = {
    (50_000, 1_000): "ImageNet-1k",
    (7_500, 200): "ImageNet-A",
    (30_000, 200): "ImageNet-R",
    (10_000, 1_000): "ImageNet-V2",
}
PAPER_TRAINING_CLASSES = 1_000
# Top-1 accuracy in %, arXiv 2507.01643, the table on visual recognition.
PAPER_ACCURACIES = {
    "AIMv2-Large": (79.88, 25.41, 55.73, 76.45),
    "SAILViT-Large": (80.71, 29.31, 56.42, 77.06),
    "AIMv2-Huge": (81.68, 28.96, 58.13, 77.32),
    "SAILViT-Huge": (82.21, 33.04, 60.33, 78.94),
    "InternViT-300M": (73.70, 13.45, 39.99, 69.55),
    "InternViT-6B": (84.18, 46.27, 59.88, 80.92),
}


@dataclass
class ProbeFindings:
    """
    Results of the models of a report.

    Attributes:
        results: One for each model, test and head: "accuracy", "low", "high", "n", the folder, "probe", and the layer
            that was chosen on the split, "layer".
        layers: The same for each layer.
        others: Names of encoders whose results are not shown.
        captions: How each probe was made.
        paper: Test of the paper -> name of the same test set in the results.
    """

    results: list[Entry] = field(default_factory=list)
    layers: list[Entry] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    paper: dict[str, str] = field(default_factory=dict)


def read_probe(folder: Path) -> dict[str, Any]:
    """
    Return results.json of a folder that `sailvit probe` wrote.

    Raises:
        ValueError: There is none, or it lacks a part.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise ValueError(f"--probe {folder}: no {RESULTS} in it: expected a folder that `sailvit probe` wrote")
    content = read_json(path)
    is_whole = all(isinstance(content.get(name), kind) for name, kind in SECTIONS.items())
    if not is_whole or not {"encoders", "data", "heads", "train"} <= content["settings"].keys():
        raise ValueError(f"{path}: no results of this release's `sailvit probe`: probe again")
    return content


def match_probes(probes: Mapping[Path, Entry], hashes: Mapping[str, str]) -> ProbeFindings:
    """
    Return the results of some models.

    Args:
        probes: Folder -> content, as `read_probe` returns it.
        hashes: Name of a model -> hash of its encoder's weights; models with equal ones have the same results.

    Raises:
        ValueError: A probe has results of none of these models, or two have results of the same.
    """
    findings = ProbeFindings()
    for folder, content in probes.items():
        names = _match(folder, content["settings"]["encoders"], hashes)
        chosen = chosen_layers(content)
        results = [{**one, "layer": chosen[one["model"], one["head"]]} for one in content["results"]]
        findings.results += _entries(folder, results, names)
        findings.layers += _entries(folder, content["layers"], names)
        findings.others += [name for name in content["settings"]["encoders"] if name not in names.values()]
        settings = content["settings"]
        findings.captions.append(
            f"{folder.name}: {settings['heads']['caption']} Trained on {without_local_path(settings['train'])}."
        )
        findings.paper |= _paper_tests(content)
    _check_twice(findings.results)
    return findings


def _match(folder: Path, encoders: Mapping[str, Entry], hashes: Mapping[str, str]) -> dict[str, str]:
    """Return model -> encoder of the probe with the same weights, the one of the same name where there are several."""
    found = {}
    for model, weights in hashes.items():
        same = [name for name, about in encoders.items() if about.get("weights_sha256") == weights]
        if same:
            found[model] = next((name for name in same if Path(name).name == Path(model).name), same[0])
    for model in hashes:
        changed = [name for name in encoders if Path(name).name == Path(model).name and name not in found.values()]
        if model not in found and changed:
            raise ValueError(f"--probe {folder}: {changed[0]} had other weights than {model} has now: probe it again")
    if not found:
        probed, expected = ", ".join(encoders), ", ".join(hashes)
        raise ValueError(f"--probe {folder}: results of other models ({probed}): expected some of {expected}")
    return found


def _entries(folder: Path, entries: Iterable[Entry], names: Mapping[str, str]) -> list[Entry]:
    entries = list(entries)
    return [
        {**entry, "model": model, "probe": str(folder)}
        for model, name in names.items()
        for entry in entries
        if entry["model"] == name
    ]


def _check_twice(results: Iterable[Entry]) -> None:
    seen: dict[tuple[str, ...], str] = {}
    for entry in results:
        key = entry["model"], entry["test"], entry["head"]
        if seen.setdefault(key, entry["probe"]) != entry["probe"]:
            what = f"{key[0]}, {key[1]}, {HEADS[key[2]]}"
            raise ValueError(f"--probe {entry['probe']}: {what} is in {seen[key]}, too: name one of them")


def _paper_tests(content: Entry) -> dict[str, str]:
    """Return test of the paper -> name in the results, by the numbers of images and of classes."""
    settings, skipped = content["settings"], [entry["data"] for entry in content["skipped"]]
    if settings["data"].get(settings["train"], {}).get("classes") != PAPER_TRAINING_CLASSES:
        return {}
    found = {}
    for name, about in settings["data"].items():
        size = about["images"] + skipped.count(name), about["classes"]
        if name != settings["train"] and size in PAPER_TESTS:
            found[PAPER_TESTS[size]] = Path(name).name or name
    return found
