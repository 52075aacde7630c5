"""See textual inversion fail on poisoned pictures and succeed with Safe-Zone Training,
on the bundled pocket model.

    python examples/quickstart.py

Draws five pictures of a concept that the model has never seen, poisons them imperceptibly (ADM+), trains
three embeddings through the real scripts, and generates with each. Writes `quickstart/comparison.png` and
`quickstart/scores.json`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from szt_utils import pocket
from szt_utils.errors import exit_on_input_error
from szt_utils.images import contact_sheet, list_images, read_image
from szt_utils.records import write_json

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "<concept>"


def run(title: str, script: str, **flags) -> None:
    """Run one of the project's scripts as a user would; its progress bar shows."""
    print(f"\n=== {title}", flush=True)
    command = [sys.executable, str(ROOT / script)]
    for name, value in flags.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    if code := subprocess.run(command).returncode:
        sys.exit(code)


def learn(title: str, image_dir: Path, output_dir: Path, arguments, **defence) -> Path:
    if not (output_dir / "learned_embeds.safetensors").exists():
        run(title, "textual_inversion_szt.py", pretrained_model_name_or_path=arguments.model,
            train_data_dir=image_dir, output_dir=output_dir, placeholder_token=TOKEN,
            initializer_token="object", resolution=128, seed=0, train_batch_size=4,
            max_train_steps=arguments.steps, learning_rate=5e-3, **defence)
    return output_dir / "learned_embeds.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart"))
    parser.add_argument("--concept", default="teal-striped-star",
                        help="see python -m szt_utils.pocket --list")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each embedding")
    parser.add_argument("--eps", type=int, default=16, help="the poison's budget, in levels of 255")
    arguments = parser.parse_args()
    with exit_on_input_error():
        compare(arguments)


def compare(arguments) -> None:
    arguments.model = pocket.model_path()
    folder = arguments.output_dir
    clean, masks, poisoned = folder / "clean", folder / "masks", folder / "poisoned"
    pocket.write_concept(arguments.concept, clean, masks)
    run("Poisoning the pictures (ADM+)", "poison_images.py", pretrained_model_name_or_path=arguments.model,
        method="adm+", image_dir=clean, output_dir=poisoned, eps=arguments.eps, resolution=128, seed=0)
    embeddings = {
        "clean_nominal": learn("Textual inversion on the clean pictures", clean,
                               folder / "clean_nominal", arguments),
        "poisoned_nominal": learn("Textual inversion on the poisoned pictures", poisoned,
                                  folder / "poisoned_nominal", arguments),
        "poisoned_szt": learn("Safe-Zone Training on the poisoned pictures", poisoned,
                              folder / "poisoned_szt", arguments, szt=True, loss_mask_dir=masks),
    }

    print("\n=== Generating with each embedding", flush=True)
    from tqdm import tqdm

    from szt_utils.metrics import Networks, evaluate_embedding

    real = [read_image(path) for path in list_images(clean)]
    networks, scores, rows = Networks(pocket.dino_path(), pocket.clip_path()), {}, []
    for name, embedding in tqdm(embeddings.items()):
        images, measured = evaluate_embedding(arguments.model, embedding, real, pocket.PROMPTS, networks)
        scores |= {"real_real": measured["real_real"], name: measured["dino"]}
        rows.append((f"{name.replace('_', ', ')}: similarity {scores[name]:.2f}", images))
    write_json(folder / "scores.json", {"similarity": scores})
    shown = [read_image(path) for path in list_images(poisoned)]
    contact_sheet([(f"the clean pictures of '{arguments.concept}': "
                    f"similarity {scores['real_real']:.2f}", real),
                   ("the same, poisoned", shown), *rows]).save(folder / "comparison.png")

    print("\nSimilarity of the pictures to the clean concept (image-encoder cosine, higher is better)")
    for name, text in {"real_real": "real pictures among themselves",
                       "clean_nominal": "learned from clean pictures",
                       "poisoned_nominal": "learned from poisoned pictures",
                       "poisoned_szt": "the same with Safe-Zone Training"}.items():
        print(f"  {text:34s} {scores[name]:.3f}")
    print(f"\nLook at {folder / 'comparison.png'}; the numbers are in {folder / 'scores.json'}.")


if __name__ == "__main__":
    main()
