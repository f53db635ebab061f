"""docs/architecture.md compared with the repository: its tree with the files, its imports with the rules; ruff."""

import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath

import pytest
from conftest import ROOT


PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = {"sailvit_cli": "cli/", "sailvit": ""}  # name -> its folder; the longest name first
OUTSIDE = ("tests/", "benchmarks/", "examples/miniature/trained/")
MOST_LAYERS = 8
THIRD_PARTY = {"torch", "torchvision", "transformers", "safetensors", "einops", "PIL", "numpy", "av"}

Rules = dict[str, list[str]]  # pattern of a row -> patterns that it may import, from the top down


def parse_tree(text: str) -> list[str]:
    """The paths that the first code block without a language names; folders end in a slash."""
    block = re.search(r"^```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[1]
    paths, parents = [], {0: ""}
    for line in block.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        path = parents[len(indent)] + name
        paths.append(path)
        parents[len(indent) + 2] = path
    return paths


def parse_rules(text: str) -> list[Rules]:
    """The rows of every table with a column "may import"."""
    tables = re.findall(r"^\|[^|]*\| may import \|\n\|[-|]*\|\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    return [
        {re.findall("`(.*?)`", row)[0]: re.findall("`(.*?)`", row)[1:] for row in table.splitlines()}
        for table in tables
    ]  # fmt: skip


def covers(pattern: str, path: str) -> bool:
    """Whether a pattern means a file: a path, "folder/" with all below it, or "folder/*.py" without that."""
    if pattern.endswith("*.py"):
        return PurePosixPath(path).parent == PurePosixPath(pattern).parent
    return path == pattern or (pattern.endswith("/") and path.startswith(pattern))


def row_of(path: str, rules: Rules) -> str | None:
    """The most specific row that a file belongs to."""
    rows = [row for row in rules if covers(row, path)]
    return max(rows, key=lambda row: (row == path, row.endswith("*.py"), len(row)), default=None)


def find_module(name: str, files: set[str]) -> str | None:
    """The file of a dotted name of this package; None if there is none."""
    for package, folder in PACKAGES.items():
        if name == package or name.startswith(f"{package}."):
            path = folder + name[len(package) + 1 :].replace(".", "/")
            candidates = [f"{path}.py", f"{path.rstrip('/')}/__init__.py".lstrip("/")]
            return next((file for file in candidates if file in files), None)
    return None


def package_of(path: str) -> list[str]:
    folder = [*PurePosixPath(path).parent.parts]
    return ["sailvit_cli", *folder[1:]] if folder[:1] == ["cli"] else ["sailvit", *folder]


def imported_names(path: str, text: str) -> list[tuple[str, str | None]]:
    """(module, name) of every import anywhere in a file, relative ones made absolute."""
    names: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [(alias.name, None) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            package = package_of(path)
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names += [(module, alias.name) for alias in node.names]
    return names


def import_graph(root: Path, files: set[str]) -> dict[str, set[str]]:
    """File -> the files of this package that it imports."""
    graph: dict[str, set[str]] = {}
    for path in sorted(files):
        graph[path] = set()
        for module, name in imported_names(path, (root / path).read_text()):
            found = find_module(f"{module}.{name}", files) if name else None
            found = found or find_module(module, files)
            assert found or module.split(".")[0] not in PACKAGES, f"{path} imports {module}, which does not exist"
            graph[path] |= {found} - {None, path}
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def forbidden_imports(graph: dict[str, set[str]], rules: Rules) -> list[str]:
    wrong = []
    for path, targets in graph.items():
        row = row_of(path, rules)
        allowed = [row, *rules[row]] if row else []
        for target in sorted(targets):
            if not any(covers(pattern, target) for pattern in allowed):
                wrong.append(f"{path} imports {target}")
    return wrong


def upward_rules(rules: Rules) -> list[str]:
    """What a row may import although it is no row below."""
    rows = [*rules]
    return [
        f"{row} -> {target}"
        for index, row in enumerate(rows)
        for target in rules[row]
        if not any(row_of_target(target, below) for below in rows[index + 1 :])
    ]


def row_of_target(target: str, row: str) -> bool:
    """Whether a row is meant, or is below the folder that is meant."""
    return target == row or (target.endswith("/") and row.startswith(target))


def count_layers(rules: Rules) -> int:
    """Rows on the longest way down."""
    layers: dict[str, int] = {}
    for row in reversed(rules):
        below = [layers[other] for target in rules[row] for other in layers if row_of_target(target, other)]
        layers[row] = 1 + max(below, default=0)
    return max(layers.values())


@pytest.fixture(scope="module")
def files() -> set[str]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return {path for path in listed.stdout.split() if not path.startswith(OUTSIDE) and (ROOT / path).exists()}


@pytest.fixture(scope="module")
def graph(files: set[str]) -> dict[str, set[str]]:
    return import_graph(ROOT, files)


def test_every_path_of_the_tree_exists():
    paths = parse_tree(PAGE.read_text())
    assert len(paths) > 50
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [path for path in paths if path.endswith("/") is not (ROOT / path).is_dir()] == []


def test_every_module_is_in_the_tree(files):
    named = {*parse_tree(PAGE.read_text())}
    missing = [path for path in files if not ({path, path.removesuffix("__init__.py")} & named)]
    assert missing == []


def test_every_package_is_installed(files):
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    installed = settings["options"]["packages"].split()
    assert {".".join(package_of(path)) for path in files} == {*installed}


def test_there_is_no_import_cycle(graph):
    assert find_cycle(graph) == []


def test_imports_follow_the_tables(graph):
    folders, root = parse_rules(PAGE.read_text())
    assert {path for path in graph if "/" not in path} == {*root}
    assert forbidden_imports(graph, folders | root) == []


def test_the_rules_lead_downward_over_few_layers():
    folders, root = parse_rules(PAGE.read_text())
    assert upward_rules(folders) == []
    assert count_layers(folders) <= MOST_LAYERS
    del root["__init__.py"]  # imports all of the others
    assert upward_rules(root) == []


def test_root_files_import_only_what_every_user_of_the_hub_has(files):
    allowed = THIRD_PARTY | {"sailvit"} | sys.stdlib_module_names
    names = {path: imported_names(path, (ROOT / path).read_text()) for path in files if "/" not in path}
    wrong = {path: {module for module, _ in own if module.split(".")[0] not in allowed} for path, own in names.items()}
    assert {path: modules for path, modules in wrong.items() if modules} == {}


@pytest.mark.parametrize("command", ["format --check", "check"])
def test_ruff_finds_nothing(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


RULES = """
| folder or files | may import |
|---|---|
| `top/` | `middle/`, `*.py` |
| `middle/one.py` | `middle/` |
| `middle/` | `*.py` |
| `*.py` | nothing |
"""


@pytest.fixture
def imports_of(tmp_path):
    """The graph of a package of given files."""

    def write(**texts: str) -> dict[str, set[str]]:
        files = {f"{name.replace('__', '/')}.py": text for name, text in texts.items()}
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(text)
        return import_graph(tmp_path, {*files})

    return write


def test_imports_are_found_wherever_they_are(imports_of):
    graph = imports_of(
        top__a="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..middle.one import C\nfrom . import b",
        top__b="def f():\n    import sailvit.model\n    from sailvit.middle import one, two",
        middle__one="import torch, os.path\nfrom .two import x",
        middle__two="from ..model import y",
        model="",
        cli__run="from sailvit_cli import arguments\nfrom .arguments import z\nfrom sailvit.top.a import w",
        cli__arguments="",
    )
    assert graph == {
        "top/a.py": {"middle/one.py", "top/b.py"},
        "top/b.py": {"model.py", "middle/one.py", "middle/two.py"},
        "middle/one.py": {"middle/two.py"},
        "middle/two.py": {"model.py"},
        "model.py": set(),
        "cli/run.py": {"cli/arguments.py", "top/a.py"},
        "cli/arguments.py": set(),
    }
    assert find_cycle(graph) == []


def test_a_module_that_does_not_exist_is_reported(imports_of):
    with pytest.raises(AssertionError, match=r"model\.py imports sailvit\.gone"):
        imports_of(model="from .gone import x")


def test_a_cycle_is_reported(imports_of):
    graph = imports_of(
        top__a="from .b import x",
        top__b="def f():\n    from ..middle.c import y",
        middle__c="from sailvit.top import a",
    )
    assert {*find_cycle(graph)} == {"top/a.py", "top/b.py", "middle/c.py"}


def test_a_forbidden_import_is_reported(imports_of):
    (rules,) = parse_rules(RULES)
    graph = imports_of(
        top__a="from ..middle.one import x\nfrom ..model import y",
        middle__one="from .two import x",
        middle__two="from ..model import y\nfrom ..top.a import z",
        model="from .middle.one import x",
        other__a="from ..model import y",
    )
    assert forbidden_imports(graph, rules) == [
        "middle/two.py imports top/a.py",
        "model.py imports middle/one.py",
        "other/a.py imports model.py",
    ]


def test_the_most_specific_row_counts(imports_of):
    (rules,) = parse_rules(RULES)
    graph = imports_of(middle__one="from .two import x\nfrom ..model import y", middle__two="", model="")
    assert forbidden_imports(graph, rules) == ["middle/one.py imports model.py"]


def test_layers_and_rules_upward_are_counted():
    (rules,) = parse_rules(RULES)
    assert upward_rules(rules) == [] and count_layers(rules) == 4
    assert upward_rules({**rules, "*.py": ["top/"]}) == ["*.py -> top/"]
    assert count_layers({"a/": ["b/"], "b/x/": ["b/y/"], "b/y/": [], "c/": []}) == 3


def test_a_tree_is_read_by_its_indentation():
    tree = "x\n```\na.py   first\nb/     second (c.py)\n  c.py\n  d/\n    e.py  deep\nf/\n  g.py\n```\n"
    assert parse_tree(tree) == ["a.py", "b/", "b/c.py", "b/d/", "b/d/e.py", "f/", "f/g.py"]
