"""Fig. 3: sensitivity to the learned word over timesteps, of clean and poisoned pictures, before and after
training.

    python examples/figures/fig3.py --data_dir figures --output_dir figures --concepts teal-striped-star

The claim (Sec. 4.1): before training, and after it on clean pictures, the concept stands out at middle
timesteps; after training on poisoned pictures sensitivity spreads far beyond it, most of all at lower ones.
"""

from world import DATA, TOKEN, concepts_of, estimate, figure, learned, load, load_mask, load_model, pictures


def measure(arguments, data: str) -> dict:
    """Per picture: mass inside the mask by timestep, before and after, and outside's mean; the first
    concept's first picture's maps."""
    import torch

    from szt_utils.embeddings import load_embedding
    from szt_utils.evidence import mass_inside
    from szt_utils.sensitivity import draw_replacements, semantic_sensitivity

    model, resolution = load_model(arguments)
    folder, rows, shown = arguments.data_dir[0], [], None
    tokenizer, encoder = model.base.tokenizer, model.base.text_encoder
    tokenizer.add_tokens([TOKEN])
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weight = encoder.get_input_embeddings().weight.detach()
    start = weight[tokenizer(arguments.initializer, add_special_tokens=False).input_ids[0]].clone()
    prompt = model.tokenize(arguments.prompt.replace("{}", TOKEN), [TOKEN])
    for concept in concepts_of(arguments, data):
        after = load_embedding(learned(arguments, data, concept))[1][0]
        for path in pictures(folder, data, concept, arguments.pictures):
            with torch.no_grad():
                latents = model.base.encode(load([path], resolution))
            mask = load_mask(folder / "masks" / concept / path.name, resolution, latents.shape[-2:])
            row, maps = {"concept": concept, "area": mask.mean().item()}, []
            for when, vector in (("before", start), ("after", after)):
                weight[-1] = vector
                generator = torch.Generator().manual_seed(arguments.seed)
                replaced, drawn = draw_replacements(prompt, arguments.replacements, model.vocabulary_size,
                                                    generator)
                noise = torch.randn((arguments.noise_draws, *latents.shape[1:]), generator=generator)
                (of_word,) = semantic_sensitivity(model, latents, prompt, arguments.timesteps, noise=noise,
                                                  replaced=replaced, drawn=drawn)
                maps.append(of_word.tolist())
                row[when] = mass_inside(of_word, mask).tolist()
                row[f"{when}_outside"] = ((of_word * (1 - mask)).sum((1, 2)) / (1 - mask).sum()).tolist()
            rows.append(row)
            shown = shown or {"path": str(path), "before": maps[0], "after": maps[1]}
    return {"timesteps": arguments.timesteps, "rows": rows, "shown": shown}


def by_concept(rows: list[dict], value) -> dict:
    """Mean of `value(row)` for every concept."""
    import numpy as np

    return {name: np.mean([value(row) for row in rows if row["concept"] == name], axis=0)
            for name in sorted({row["concept"] for row in rows})}


def claims(results: dict) -> dict:
    import numpy as np

    timesteps = np.array(results["clean"]["timesteps"])
    low = timesteps < 500
    found = {"share of the picture that the mask covers": estimate(
        list(by_concept(results["clean"]["rows"], lambda row: row["area"]).values()))}

    def after(data, name):
        """Of every concept, at low timesteps."""
        return by_concept(results[data]["rows"], lambda row: np.array(row[name])[low].mean())

    clean, clean_outside = after("clean", "after"), after("clean", "after_outside")
    for data, result in results.items():
        for when in ("before", "after"):
            for name, at in (("t < 500", low), ("t >= 500", ~low)):
                value = by_concept(result["rows"],
                                   lambda row, when=when, at=at: np.array(row[when])[at].mean())
                found[f"{data}, {when}: mass inside the mask, {name}"] = estimate(list(value.values()))
        if data != "clean":
            own, outside = after(data, "after"), after(data, "after_outside")
            found[f"{data}, after: mass inside less that of clean, t < 500"] = estimate(
                [own[name] - clean[name] for name in own])
            found[f"{data}, after: mean outside the mask over that of clean, t < 500"] = estimate(
                [[outside[name], clean_outside[name]] for name in own],
                lambda rows: rows[:, 0].mean() / rows[:, 1].mean())
    return found


def draw(results: dict, path) -> None:
    import numpy as np
    from world import read_square

    from szt_utils.plots import map_grid

    rows, labels, images = [], [], []
    for when in ("before", "after"):
        for data, result in results.items():
            rows.append(result["shown"][when])
            labels.append(f"{data}\n{when}")
            images.append(read_square(result["shown"]["path"]))
    map_grid(path, images, np.array(rows), labels, results["clean"]["timesteps"])


if __name__ == "__main__":
    figure("fig3", __doc__, measure, claims, draw, {
        "pictures": 2, "timesteps": [50, 200, 350, 500, 650, 800, 950], "replacements": 16, "noise_draws": 1,
        "prompt": "a photo of a {} on grass", "initializer": "object", "seed": 0}, DATA)
