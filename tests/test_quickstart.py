"""The quickstart with the real scripts and model: the poison harms, Safe-Zone Training recovers."""

import json

import pytest
from conftest import run_script
from PIL import Image


@pytest.mark.slow
def test_quickstart_shows_harm_and_recovery(tmp_path):
    done = run_script("examples/quickstart.py", "--output_dir", tmp_path / "quickstart")
    written = json.loads((tmp_path / "quickstart" / "scores.json").read_text())
    scores, attributes = written["similarity"], written["attributes"]
    assert set(scores) == {"real_real", "clean_nominal", "poisoned_nominal", "poisoned_szt"}
    harm = scores["clean_nominal"] - scores["poisoned_nominal"]
    recovered = scores["poisoned_szt"] - scores["poisoned_nominal"]
    assert harm > 0.25 * scores["clean_nominal"], scores
    assert recovered > 0.5 * harm, scores
    assert set(attributes) == set(scores) and attributes["real_real"] == 1
    assert attributes["poisoned_nominal"] < attributes["poisoned_szt"], attributes
    assert Image.open(tmp_path / "quickstart" / "comparison.png").width > 8 * 128
    assert "with Safe-Zone Training" in done.stdout
