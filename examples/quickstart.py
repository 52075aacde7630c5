"""Textual inversion fails on poisoned images and succeeds with Safe-Zone Training, on the bundled pocket
model.

    python examples/quickstart.py

Draws five images of a concept that the model has never seen, poisons them imperceptibly (ADM+), trains three
embeddings with the project's scripts, and generates images with each. Writes `quickstart/comparison.png` and
`quickstart/scores.json`.
"""

from pathlib import Path

from tqdm import tqdm

import poison_images
import textual_inversion_szt
from szt_utils import pocket
from szt_utils.arguments import command_line, number, script_parser, user_path
from szt_utils.errors import exit_on_input_error
from szt_utils.evaluation import evaluate_embedding
from szt_utils.files import write_json
from szt_utils.images import contact_sheet, list_images, read_image
from szt_utils.metrics import Networks, score_images

DESCRIPTIONS = {"real_real": "clean images among themselves",
                "clean_nominal": "learned from clean images",
                "poisoned_nominal": "learned from poisoned images",
                "poisoned_szt": "the same with Safe-Zone Training"}


def announce(title: str) -> None:
    print(f"\n=== {title}", flush=True)


def learn(title: str, image_dir: Path, output_dir: Path, steps: int, **defence: object) -> Path:
    """Train an embedding unless it exists; returns its file."""
    embedding = output_dir / "learned_embeds.safetensors"
    if not embedding.exists():
        announce(title)
        textual_inversion_szt.main(command_line(
            pretrained_model_name_or_path=pocket.model_path(), train_data_dir=image_dir,
            output_dir=output_dir, placeholder_token="<concept>", initializer_token="object", resolution=128,
            seed=0, train_batch_size=4, max_train_steps=steps, learning_rate=5e-3, **defence))
    return embedding


def compare(folder: Path, concept: str, steps: int, eps: int) -> None:
    """Poison, train three embeddings, generate with each, and write the comparison."""
    images = folder / f"{concept}-eps{eps}"  # other flags have other images and embeddings
    learned = images / f"steps{steps}"
    clean, masks, poisoned = images / "clean", images / "masks", images / "poisoned"
    pocket.write_concept(concept, clean, masks)
    announce("Poisoning the images (ADM+)")
    poison_images.main(command_line(
        pretrained_model_name_or_path=pocket.model_path(), method="adm+", image_dir=clean,
        output_dir=poisoned, eps=eps, resolution=128, seed=0))
    embeddings = {
        "clean_nominal": learn("Textual inversion on the clean images", clean, learned / "clean_nominal",
                               steps),
        "poisoned_nominal": learn("Textual inversion on the poisoned images", poisoned,
                                  learned / "poisoned_nominal", steps),
        "poisoned_szt": learn("Safe-Zone Training on the poisoned images", poisoned, learned / "poisoned_szt",
                              steps, szt=True, loss_mask_dir=masks)}

    announce("Generating with each embedding")
    clean_images, poisoned_images = ([read_image(path) for path in list_images(images)]
                                     for images in (clean, poisoned))
    networks = Networks(pocket.dino_path(), pocket.clip_path())
    scores, rows = {}, []
    own = score_images(clean_images, clean_images, [], networks, ["attributes"])
    attributes = {"real_real": own["attributes"]}
    for name, embedding in tqdm(embeddings.items()):
        images, metrics = evaluate_embedding(pocket.model_path(), embedding, clean_images, pocket.PROMPTS,
                                             networks, metrics=("dino", "attributes"))
        scores |= {"real_real": metrics["real_real"], name: metrics["dino"]}
        attributes[name] = metrics["attributes"]
        rows.append((f"{name.replace('_', ', ')}: similarity {scores[name]:.2f}, attributes "
                     f"{attributes[name]:.0%}", images))
    write_json(folder / "scores.json", {"similarity": scores, "attributes": attributes})
    contact_sheet([(f"the clean images of '{concept}': similarity {scores['real_real']:.2f}", clean_images),
                   ("the same, poisoned", poisoned_images), *rows]).save(folder / "comparison.png")

    print("\nSimilarity to the clean concept (cosine of image features), and the share of images\n"
          "with its shape, color and pattern")
    for name, text in DESCRIPTIONS.items():
        print(f"  {text:34s} {scores[name]:.3f} {attributes[name]:6.0%}")
    print(f"\nLook at {folder / 'comparison.png'}; the numbers are in {folder / 'scores.json'}.")


def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--output_dir", type=user_path, default="quickstart")
    add("--concept", default="teal-striped-star", help="see python -m szt_utils.pocket --list")
    add("--steps", type=number(int, 1), default=400, help="training steps of each embedding (400)")
    add("--eps", type=number(int, 0, 255), default=16, help="the poison's budget, in 1/255 levels (16)")
    args = parser.parse_args(argv)
    with exit_on_input_error():
        compare(Path(args.output_dir), args.concept, args.steps, args.eps)


if __name__ == "__main__":
    main()
