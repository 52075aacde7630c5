"""A good run prints what it does and nothing else: no library speaks in between."""

import re
import subprocess
import sys

from conftest import ROOT, TOKEN, flags

OURS = ("Steps:", "batch/s]", "batch]")  # progress bars


def test_a_training_with_validation_and_its_evaluation_print_only_their_own_lines(tiny_model, concept_folder,
                                                                                  tmp_path):
    images, masks = concept_folder
    training = flags(tiny_model, images, tmp_path / "learned", max_train_steps=2, szt=True,
                     loss_mask_dir=masks, validation_prompt=f"a {TOKEN}", validation_steps=2,
                     num_validation_images=1, save_as_full_pipeline=True)
    (tmp_path / "prompts.txt").write_text("a {} on sand")
    evaluation = ["--pretrained_model_name_or_path", tiny_model, "--embeddings", tmp_path / "learned",
                  "--clean_dir", images, "--prompts_file", tmp_path / "prompts.txt", "--images_per_prompt", 2,
                  "--num_inference_steps", 1, "--output_dir", tmp_path / "scores"]
    code = (f"import textual_inversion_szt, evaluate\ntextual_inversion_szt.main({[*map(str, training)]})\n"
            f"print('===', flush=True)\nevaluate.main({[*map(str, evaluation)]})\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    bars = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip()]
    assert not [line for line in bars if not any(own in line for own in OURS)]
    assert not re.search(r"\b0/0\b", done.stderr)
    trained, evaluated = done.stdout.split("===\n")
    expected = [r"5 images from .*, JPEG quality 25", r"timesteps \d+ to \d+ \(uniform\): .*", r"5 masks, .*",
                r"Saved .*learned_embeds\.safetensors\."]
    lines = [line for line in trained.splitlines() if not any(re.fullmatch(own, line) for own in expected)]
    assert not lines and len(trained.splitlines()) == len(expected)
    assert re.fullmatch(r"warning: The bundled .*\nwarning: FID .*\n2 generated images, 5 clean ones\n"
                        r"(  \w+ +-?[\d.]+\n){10}", evaluated)
