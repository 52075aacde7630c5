"""Fig. 2: semantic sensitivity maps against cross-attention maps, of words that the model knows.

    python examples/figures/fig2.py --data_dir figures --output_dir figures

A concept's folder gives the prompt: of `teal-striped-star`, "a photo of a teal striped star", and the word
that names the masked thing is its last. The claim (Sec. 4.1): sensitivity lies where the word acts,
cross-attention spreads and dwells on the start token.
"""

from world import concepts_of, estimate, figure, load, load_mask, load_model, pictures


def measure(arguments, data: str) -> dict:
    """Per picture: the share of each map's mass within the true mask, the mask's area, and how much attention
    and sensitivity the start token has beside the word; the maps of the first picture of three concepts."""
    import torch

    from szt_utils.evidence import mass_inside
    from szt_utils.sensitivity import cross_attention_maps, draw_replacements, semantic_sensitivity

    model, resolution = load_model(arguments)
    folder, rows, maps = arguments.data_dir[0], [], {}
    for concept in concepts_of(arguments, data):
        words = concept.split("-")
        start = model.base.tokenizer.bos_token
        prompt = model.tokenize(f"a photo of a {' '.join(words)}", [start, words[-1]])
        for path in pictures(folder, data, concept, arguments.pictures):
            with torch.no_grad():
                latents = model.base.encode(load([path], resolution))
            generator = torch.Generator().manual_seed(arguments.seed)
            replaced, drawn = draw_replacements(prompt, arguments.replacements, model.vocabulary_size,
                                                generator)
            noise = torch.randn((arguments.noise_draws, *latents.shape[1:]), generator=generator)
            timesteps = arguments.timesteps
            ssm = semantic_sensitivity(model, latents, prompt, timesteps, noise=noise, replaced=replaced,
                                       drawn=drawn)
            attention = cross_attention_maps(model, latents, prompt, timesteps, noise=noise)
            mask = load_mask(folder / "masks" / concept / path.name, resolution, latents.shape[-2:])
            rows.append({"area": mask.mean().item(),
                         "ssm": mass_inside(ssm[1], mask).tolist(),
                         "attention": mass_inside(attention[1], mask).tolist(),
                         "start_ssm": (ssm[0].mean((1, 2)) / ssm[1].mean((1, 2))).tolist(),
                         "start_attention": (attention[0].mean((1, 2)) / attention[1].mean((1, 2))).tolist()})
            if len(maps) < 3 and path == pictures(folder, data, concept)[0]:
                maps[str(path)] = {"words": ["start token", words[-1]], "ssm": ssm.tolist(),
                                   "attention": attention.tolist()}
    return {"timesteps": timesteps, "rows": rows, "maps": maps}


def claims(results: dict) -> dict:
    import numpy as np

    clean, found = results["clean"], {}
    area = np.array([row["area"] for row in clean["rows"]])
    for i, t in enumerate(clean["timesteps"]):
        value = {name: np.array([row[name][i] for row in clean["rows"]])
                 for name in ("ssm", "attention", "start_ssm", "start_attention")}
        found |= {f"t = {t}: share of the map's mass inside the mask, SSM": estimate(value["ssm"]),
                  f"t = {t}: share of the map's mass inside the mask, cross-attention":
                      estimate(value["attention"]),
                  f"t = {t}: SSM less cross-attention": estimate(value["ssm"] - value["attention"]),
                  f"t = {t}: start token's mean map over the word's, SSM":
                      estimate(value["start_ssm"], np.median),
                  f"t = {t}: start token's mean map over the word's, cross-attention":
                      estimate(value["start_attention"], np.median)}
    return {"share of the picture that the mask covers": estimate(area), **found}


def draw(results: dict, path) -> None:
    import numpy as np
    from world import read_square

    from szt_utils.plots import map_grid

    clean, rows, labels, images = results["clean"], [], [], []
    for name, of_picture in clean["maps"].items():
        for kind in ("ssm", "attention"):
            for word, maps in zip(of_picture["words"], of_picture[kind], strict=True):
                rows.append(maps)
                labels.append(f"{word}\n{kind}")
                images.append(read_square(name))
    map_grid(path, images, np.array(rows), labels, clean["timesteps"])


if __name__ == "__main__":
    figure("fig2", __doc__, measure, claims, draw,
           {"pictures": 3, "timesteps": [100, 300, 500, 700, 900], "replacements": 16, "noise_draws": 1,
            "seed": 0},
           ("clean",))
