"""The training script as a reader and a user meet it: four marked lines, short functions, a copy alone."""

import ast
import os
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from conftest import ROOT, SCRIPT, embedding, flags
from upstream import upstream

MARK = "# SZT"


def run_alone(folder, arguments) -> subprocess.CompletedProcess:
    """Run the script of a folder of its own, as a user of the installed package would."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True)


@pytest.fixture
def installed():
    try:
        metadata.version("szt-utils")
    except metadata.PackageNotFoundError:
        pytest.skip("the package is not installed: pip install -e .")


def test_the_method_is_four_marked_lines():
    marked = [line for line in (ROOT / SCRIPT).read_text().splitlines() if line.endswith(MARK)]
    assert len(marked) == 4
    calls = ("zone.prepare_mask(", "zone.purify(", "zone.timestep_distribution(", "zone.mean(")
    assert all(call in line for call, line in zip(calls, marked, strict=True))


def test_the_script_and_its_functions_are_short():
    text = (ROOT / SCRIPT).read_text()
    assert len(text.splitlines()) <= 300
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {"prepare", "draw", "optimize", "train", "main"} <= set(lengths) and max(lengths.values()) <= 46


def test_without_the_marked_lines_the_script_is_upstreams(installed, tiny_model, concept_folder, tmp_path):
    """Also with the flags of the defence: nothing else in the script or its library applies it."""
    images, masks = concept_folder
    lines = (ROOT / SCRIPT).read_text().splitlines(keepends=True)
    (tmp_path / SCRIPT).write_text("".join(line for line in lines if not line.endswith(f"{MARK}\n")))
    done = run_alone(tmp_path, flags(tiny_model, images, tmp_path / "out", szt=True, loss_mask_dir=masks))
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(embedding(tmp_path / "out"), upstream(tiny_model, images))


def test_a_copy_of_the_script_alone_trains_in_a_users_folder(installed, tiny_model, concept_folder, tmp_path):
    images, masks = concept_folder
    shutil.copy(ROOT / SCRIPT, tmp_path / SCRIPT)
    arguments = flags(tiny_model, images, "learned", szt=True, loss_mask_dir=masks, max_train_steps=2)
    done = run_alone(tmp_path, arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert embedding(tmp_path / "learned").isfinite().all() and "warning: this script" not in done.stderr


def test_a_copy_of_another_version_says_so(installed, tmp_path):
    text = (ROOT / SCRIPT).read_text()
    version = text.split('__version__ = "')[1].split('"')[0]
    (tmp_path / SCRIPT).write_text(text.replace(f'__version__ = "{version}"', '__version__ = "0.0.1"'))
    done = run_alone(tmp_path, flags("nowhere", "none", "learned"))
    assert done.returncode == 1 and done.stderr.startswith(
        f"warning: this script is of version 0.0.1, but the installed szt_utils of version {version}; ")


def test_safe_zone_flags_stand_first_in_the_help():
    done = subprocess.run([sys.executable, str(ROOT / SCRIPT), "--help"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    groups = [line for line in done.stdout.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups[:2] == ["options:", "Safe-Zone Training:"]
    assert done.stdout.index("  --szt") < done.stdout.index("  --pretrained_model_name_or_path P")
