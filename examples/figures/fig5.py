"""Fig. 5: the norm of the loss's gradient with respect to the trained embedding, over timesteps.

    python examples/figures/fig5.py --data_dir figures --output_dir figures --data clean adm+

The claim (Sec. 4.2): gradients are near zero at t = 0 and at high timesteps; what is learned, and what
poisons teach, comes from lower and middle ones.
"""

from world import DATA, TOKEN, concepts_of, estimate, figure, learned, load, load_model, pictures


def measure(arguments, data: str) -> dict:
    """Gradient norms by concept, (concepts, timesteps): means over pictures and draws."""
    import torch

    from szt_utils.embeddings import NewRows, load_embedding

    model, resolution = load_model(arguments)
    base = model.base
    last = base.scheduler.config.num_train_timesteps - 1
    timesteps = torch.linspace(0, last, arguments.timesteps).round().long()
    frozen = base.text_encoder.get_input_embeddings().weight
    base.tokenizer.add_tokens([TOKEN])
    prompt = base.tokenizer(arguments.prompt.replace("{}", TOKEN), padding="max_length", truncation=True,
                            max_length=base.tokenizer.model_max_length, return_tensors="pt").input_ids
    place = prompt == base.tokenizer.convert_tokens_to_ids(TOKEN)
    norms = []
    for concept in concepts_of(arguments, data):
        vector = load_embedding(learned(arguments, data, concept))[1][0]
        # One row per sample, so that one backward pass gives the gradient of each sample alone.
        embedding = NewRows(frozen[:base.tokenizer.vocab_size], vector.expand(len(timesteps), -1))
        base.text_encoder.set_input_embeddings(embedding)
        ids = prompt.expand(len(timesteps), -1).clone()
        ids[place.expand_as(ids)] = len(embedding.frozen) + torch.arange(len(timesteps))
        paths, of_concept = pictures(arguments.data_dir[0], data, concept), []
        for i in range(arguments.draws):
            generator = torch.Generator().manual_seed(arguments.seed + i)
            with torch.no_grad():
                latents = base.encode(load([paths[i % len(paths)]], resolution))
            noise = torch.randn((len(timesteps), *latents.shape[1:]), generator=generator)
            loss = base.loss(latents.expand_as(noise), noise, timesteps, base.text_encoder(ids)[0])
            (gradient,) = torch.autograd.grad(loss.flatten(1).mean(1).sum(), embedding.rows)
            of_concept.append(gradient.norm(dim=1))
        norms.append(torch.stack(of_concept).mean(0).tolist())
    return {"timesteps": timesteps.tolist(), "norms": norms}


def claims(results: dict) -> dict:
    import numpy as np

    found = {}
    for data, result in results.items():
        timesteps, norms = np.array(result["timesteps"]), np.array(result["norms"])
        found |= {f"{data}: mean gradient norm at t > 700 over its peak": estimate(
                      norms, lambda rows, t=timesteps: rows.mean(0)[t > 700].mean() / rows.mean(0).max()),
                  f"{data}: gradient norm at t = 0 over its peak": estimate(
                      norms, lambda rows: rows.mean(0)[0] / rows.mean(0).max()),
                  f"{data}: timestep of the peak": estimate(
                      norms, lambda rows, t=timesteps: t[rows.mean(0).argmax()])}
        if data != "clean":
            clean = np.array(results["clean"]["norms"])[:len(norms)]
            found[f"{data}: gradient norm at t < 500 over that of clean"] = estimate(
                np.stack([norms, clean], 1), lambda rows, t=timesteps: rows[:, 0, t < 500].mean()
                / rows[:, 1, t < 500].mean())
    return found


def draw(results: dict, path) -> None:
    import numpy as np

    from szt_utils.plots import COLOURS, save_figure, subplots

    drawn, axes = subplots(1, 1, width=6.5, height=4)
    for data, result in results.items():
        norms = np.array(result["norms"])
        low, middle, high = np.quantile(norms, [0.25, 0.5, 0.75], axis=0)
        axes[0, 0].fill_between(result["timesteps"], low, high, color=COLOURS[data], alpha=0.25, linewidth=0)
        axes[0, 0].plot(result["timesteps"], middle, color=COLOURS[data],
                        label=f"{data} ({len(norms)} concepts)")
    axes[0, 0].set(xlabel="timestep", ylabel="norm of the loss's gradient", ylim=(0, None))
    axes[0, 0].legend()
    save_figure(drawn, path)


if __name__ == "__main__":
    figure("fig5", __doc__, measure, claims, draw,
           {"timesteps": 21, "draws": 10, "prompt": "a photo of a {}", "seed": 0}, DATA)
