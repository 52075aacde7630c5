"""The import graph: arrows point from scripts to library, in no circle, and nothing heavy loads early."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

LIBRARY = sorted((ROOT / "szt_utils").rglob("*.py"))
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.stem != "setup")
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
FOLDERS = {"examples", "tests", "benchmarks"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in LIBRARY}


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports; `from package import module` means the module."""
    name = module_name(path).split(".")
    package = name if path.name == "__init__.py" else name[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            modules = {f"{source}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= modules or {source}
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def test_the_sets_under_test_are_there():
    assert len(LIBRARY) >= 20 and len(SCRIPTS) >= 2
    assert {"szt_utils.images", "szt_utils.pocket", "szt_utils.pocket.__main__",
            "szt_utils.models"} <= set(MODULES)
    assert "textual_inversion_szt" in {path.stem for path in SCRIPTS}
    # The reader of imports sees relative, absolute, nested and lazy ones.
    assert {"szt_utils.errors", "szt_utils.files"} <= imports(MODULES["szt_utils.images"])
    assert "szt_utils.captions" in imports(MODULES["szt_utils.pocket.vocabulary"])
    assert {"argparse", "szt_utils.pocket"} <= imports(MODULES["szt_utils.pocket.__main__"])
    assert {"torch", "szt_utils.models"} <= imports(ROOT / "textual_inversion_szt.py")


def test_the_library_imports_no_script_and_parses_no_arguments():
    scripts = {path.stem for path in SCRIPTS} | {path.stem for path in EXAMPLES} | FOLDERS
    for name, path in MODULES.items():
        assert not tops(path) & scripts, f"{name} imports a script"
        own = ("szt_utils.pocket.__main__", "szt_utils.arguments")
        assert "argparse" not in tops(path) or name in own, f"{name} imports argparse"
        assert "matplotlib" not in tops(path) or name == "szt_utils.plots", f"{name} imports matplotlib"


def test_scripts_import_the_library_and_never_each_other():
    names = {path.stem for path in SCRIPTS}
    for path in SCRIPTS:
        assert not tops(path) & (names | FOLDERS), f"{path.name} imports a script"
        assert "szt_utils" in tops(path)


def test_only_main_of_a_script_imports_late():
    """Everything behind it is a module with imports at its top; the training script shows its loop."""
    for path in SCRIPTS:
        tree = ast.parse(path.read_text())
        late = {function.name for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
                for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)}
        allowed = {"main"}
        if path.stem == "textual_inversion_szt":
            allowed = {"read_settings", "prepare", "draw", "optimize", "train"}
        assert late and late <= allowed, f"{path.name} imports late in {late - allowed}"


def test_no_namespace_travels_behind_main():
    """Only the functions that make settings of one see it; the library's parsing stands in `arguments`."""
    allowed, seen = {"parse_args", "main", "read_settings", "given_settings"}, set()
    for path in [*SCRIPTS, *LIBRARY]:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and path.stem != "arguments":
                if any(ast.unparse(argument.annotation or ast.Constant(0)) == "argparse.Namespace"
                       or (argument.arg == "args" and path in SCRIPTS)
                       for argument in function.args.args):
                    seen.add(function.name)
                    assert function.name in allowed, f"{path.name}: {function.name}"
    assert seen <= allowed and "read_settings" in seen


def test_public_functions_are_typed():
    for path in [*LIBRARY, *SCRIPTS]:
        body = ast.parse(path.read_text()).body
        for node in body + [part for each in body if isinstance(each, ast.ClassDef) for part in each.body]:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                assert not bare, f"{path.name}: {node.name}({', '.join(bare)})"


def test_the_librarys_imports_run_in_no_circle_and_lead_somewhere():
    graph = {name: {target for target in imports(path) if target.startswith("szt_utils")}
             for name, path in MODULES.items()}
    assert set().union(*graph.values()) <= set(MODULES)
    assert sum(map(len, graph.values())) >= 20
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_importing_the_library_is_light_and_silent():
    """One process imports it all: no model library, no plotting, nothing printed, no random number drawn."""
    names = sorted(name for name in MODULES if not name.endswith("__main__") and name != "szt_utils.plots")
    assert len(names) >= 20
    code = ("import random, sys, importlib\nimport numpy, torch\n"
            "state = lambda: (random.getstate(), torch.get_rng_state().tolist(), numpy.random.rand())\n"
            "numpy.random.seed(0)\nbefore = state()\nnumpy.random.seed(0)\n"
            f"for name in {names}: importlib.import_module(name)\n"
            "assert before == state()\n"
            "heavy = ['diffusers', 'transformers', 'accelerate', 'matplotlib', 'tokenizers', 'datasets']\n"
            "assert not [name for name in heavy if name in sys.modules], sorted(sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_a_script_imports_nothing_that_takes_seconds():
    names = [path.stem for path in SCRIPTS]
    code = (f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\n"
            "heavy = ['torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'accelerate']\n"
            "assert not [name for name in heavy if name in sys.modules], sorted(sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert len(names) >= 7 and (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_public_names_exist():
    import importlib

    checked = 0
    for name in sorted(MODULES):
        if name.endswith("__main__"):
            continue
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", []):
            assert hasattr(module, public), f"{name}.{public}"
            checked += 1
    assert checked > 50
