"""The layers of the package, checked from its source: imports run one way only."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import mutation
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vjvcr_fast"

# From the lowest layer to the highest. A module imports only from lower layers and from its own folder.
LAYERS = [
    ("reference", "data", "kernels"),
    ("native_build",),
    ("native",),
    ("losses",),
    ("bench", "latents"),
    ("models",),
    ("settings",),
    ("config", "cli_parser"),
    ("training",),
    ("runs", "cli_info", "cli_options", "cli_scan"),
    ("evaluation", "export"),
    ("paper",),
    ("cli_bench", "cli_reproduce"),
    ("cli",),
    ("__main__",),
]
FILES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
FILES |= {f"kernels.{p.stem}": p for p in (ROOT / "kernels").glob("*.py")}


def imports(path: Path) -> set[str]:
    """The full names of all modules that a file imports, at its head or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            name = node.module or ""
            # `from package import module` imports the module, `from module import name` the module that has it.
            found |= {f"{name}.{a.name}" if is_module(f"{name}.{a.name}") else name for a in node.names}
    return found


def is_module(name: str) -> bool:
    own = name.removeprefix("vjvcr_fast.")
    return name.startswith("vjvcr_fast.") and (own in FILES or f"{own}.__init__" in FILES)


def own_imports(module: str) -> set[str]:
    return {name.removeprefix("vjvcr_fast.") for name in imports(FILES[module]) if name.startswith("vjvcr_fast.")}


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module.split(".")[0] in names)


@pytest.mark.parametrize("module", sorted(set(FILES) - {"__init__"}))
def test_imports_run_downward(module: str) -> None:
    for other in own_imports(module):
        same_folder = other.split(".")[0] == module.split(".")[0]
        assert same_folder or layer(other) < layer(module), f"{module} imports {other}"


def test_no_import_is_circular() -> None:
    graphlib.TopologicalSorter({module: own_imports(module) for module in FILES}).prepare()


def test_the_package_itself_imports_nothing() -> None:
    """At its head. `load` imports when it is called, and type checkers import."""
    tree = ast.parse(FILES["__init__"].read_text())
    at_once = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in at_once if isinstance(node, ast.ImportFrom)] == ["typing"]
    assert len(at_once) == 1


def test_reference_imports_torch_only() -> None:
    beyond = {name.split(".")[0] for name in imports(FILES["reference"])} - {*sys.stdlib_module_names}
    assert beyond == {"torch"}


def test_top_level_folders() -> None:
    assert (ROOT / "kernels" / "__init__.py").is_file()
    assert not (PACKAGE / "kernels").exists()  # the source lies at the top; it is installed inside
    assert (PACKAGE / "py.typed").is_file()


def test_every_fault_of_mutation_fits() -> None:
    """What a fault replaces is in the code, and the tests that should notice are there."""
    for fault in mutation.FAULTS:
        mutation.changed(fault, ROOT)
        assert all(mutation.located(ROOT, (name,)) for name in fault.tests), fault


PROBE = """
import importlib, sys
import torch
for module in ("vjvcr_fast.reference", "vjvcr_fast.losses", "vjvcr_fast.cli"):
    before = set(sys.modules)
    importlib.import_module(module)
    beyond = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
    print(module, *sorted(beyond), "cuda" if torch.cuda.is_initialized() else "no cuda")
"""


def test_importing_needs_torch_alone_and_no_gpu() -> None:
    """Packages of the optional extras are imported only when they are used."""
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "vjvcr_fast.reference vjvcr_fast no cuda",
        "vjvcr_fast.losses vjvcr_fast no cuda",
        "vjvcr_fast.cli vjvcr_fast no cuda",
    ]
