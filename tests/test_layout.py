"""The layout of vqa/: packages import in one direction, and no module is too large or too small to be found."""

import ast
from pathlib import Path

from conftest import ROOT

MAY_IMPORT = {
    "core": set(),
    "config": {"core"},
    "data": {"core", "config"},
    "evaluation": {"core", "config", "data"},
    "modeling": {"core", "config", "data"},
    "inference": {"core", "config", "data", "evaluation", "modeling"},
    "training": {"core", "config", "data", "evaluation", "modeling", "inference"},
    "reports": {"core", "config", "data", "evaluation", "modeling", "inference"},
}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}


def modules() -> list[Path]:
    return sorted((ROOT / "vqa").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def test_packages_import_in_one_direction():
    wrong = []
    for path in modules():
        package = path.relative_to(ROOT / "vqa").parts[0]
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "vqa" and (len(parts) < 2 or parts[1] not in MAY_IMPORT[package] | {package}):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_the_library_imports_no_script():
    wrong = [f"{path}: {sorted(imports(path) & SCRIPTS)}" for path in modules() if imports(path) & SCRIPTS]
    assert not wrong, wrong


def test_every_package_says_what_it_holds():
    for package in MAY_IMPORT:
        assert ast.get_docstring(ast.parse((ROOT / "vqa" / package / "__init__.py").read_text()))


def test_no_module_is_over_350_lines():
    long = {str(path.relative_to(ROOT)): n for path in modules() if (n := len(path.read_text().splitlines())) > 350}
    assert not long, long


def test_no_small_module_serves_only_one_other():
    """A module of under 60 lines with one importer belongs into that importer."""
    files = [*modules(), *ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("checkpoints/*.py")]
    users: dict[str, set[str]] = {}
    for path in files:
        for name in imports(path):
            users.setdefault(name, set()).add(str(path))
    small = []
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        family = path.parent.name == "families"  # one file a family, so that adding one is copying one
        if path.name != "__init__.py" and not family and len(path.read_text().splitlines()) < 60:
            if len(users.get(name, ())) <= 1:
                small.append(name)
    assert not small, small
