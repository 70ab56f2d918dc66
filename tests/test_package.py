"""The package: what is installed, what is public, and that the documents are true."""

import ast
import importlib.metadata
import re
import runpy
from pathlib import Path

import pytest

import seqbatch

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "seqbatch").rglob("*.py"))


def test_requirements_are_those_of_setup_cfg() -> None:
    """An unknown key in setup.cfg is ignored silently; the metadata shows whether it was read."""
    names = {re.split(r"[<>=!\[; ]", line)[0] for line in importlib.metadata.requires("seqbatch") or []}

    assert {"torch", "numpy", "scipy", "pandas", "numba", "click", "tqdm", "matplotlib", "pytest"} <= names
    assert seqbatch.__version__ == importlib.metadata.version("seqbatch")


def test_public_names_are_there() -> None:
    """Each can be had, is documented, and is listed."""
    for name in set(seqbatch.__all__) - {"__version__"}:
        assert getattr(seqbatch, name).__doc__
        assert name in dir(seqbatch)
    with pytest.raises(AttributeError, match="no attribute 'Paddding'"):
        seqbatch.Paddding  # noqa: B018


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_function_is_documented_and_nothing_is_asserted(path: Path) -> None:
    """Users get ValueError or TypeError, never an assertion."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            public = node in tree.body
            assert ast.get_docstring(node) or not public, f"{path.name}:{node.lineno} {node.name}"


def test_test_files_are_collected() -> None:
    """A file that pytest does not match would never run."""
    helpers = {
        "conftest",
        "killed",
        "laws",
        "loaders",
        "pipeline_ranks",
        "pipeline_restart",
        "pipelines",
        "random_cells",
    }
    helpers |= {"scans", "steps", "strategies", "twins"}
    assert all(p.stem in helpers or p.stem.startswith("test_") for p in (ROOT / "tests").glob("*.py"))


def test_commands_in_the_readme_exist() -> None:
    """Every make target and every seqbatch command that the README names."""
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^ +make (\w+)", readme, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M)
    from seqbatch.cli import main

    assert set(re.findall(r"^ +seqbatch (\w+)", readme, flags=re.M)) <= set(main.commands)
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("name", ["own_loop", "pair_loop", "lightning_loop", "trainer_loop", "accelerate_loop"])
def test_the_readme_shows_the_examples(name: str) -> None:
    """What is shown is what the integration tests run."""
    code = (ROOT / "examples" / f"{name}.py").read_text()
    assert f"```python\n{code.rstrip()}\n```" in (ROOT / "README.md").read_text()


def test_own_loops_run() -> None:
    """The examples that need no framework run here too, and learn."""
    for name, batch in (("own_loop", "batch"), ("pair_loop", "target")):
        found = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
        assert found["losses"].item() * found[batch].loss_scale < 3.0  # guessing is log(128) = 4.85
