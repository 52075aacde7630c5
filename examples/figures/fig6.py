"""Fig. 6: the loss inside and outside the concept during training, on clean and on poisoned pictures.

    python examples/figures/fig6.py --data_dir figures --output_dir figures --data clean adm+ sds+ ea

Measured with the embeddings that the training saved on its way, all with the same noise and timesteps: the
training's own record of both (stats.jsonl, whenever masks are given) draws others at every step. The claim
(Sec. 4.3): on clean pictures training lowers the loss inside the concept and leaves the rest; on poisoned
ones both fall by the same proportion.
"""

from world import (
    DATA,
    TOKEN,
    concepts_of,
    estimate,
    figure,
    learned,
    load,
    load_mask,
    load_model,
    pictures,
)


def measure(arguments, data: str) -> dict:
    """Mean losses inside and outside, (concepts, steps, 2)."""
    import torch

    from szt_utils.embeddings import load_embedding
    from szt_utils.masks import masked_mean
    from szt_utils.timesteps import sample_timesteps

    model, resolution = load_model(arguments)
    base, folder, losses = model.base, arguments.data_dir[0], []
    base.tokenizer.add_tokens([TOKEN])
    base.text_encoder.resize_token_embeddings(len(base.tokenizer), mean_resizing=False)
    weight = base.text_encoder.get_input_embeddings().weight.detach()
    initial = weight[base.tokenizer(arguments.initializer, add_special_tokens=False).input_ids[0]].clone()
    for concept in concepts_of(arguments, data):
        paths, of_concept = pictures(folder, data, concept), []
        with torch.no_grad():
            latents = torch.cat([base.encode(load([path], resolution)) for path in paths])
        masks = torch.stack([load_mask(folder / "masks" / concept / path.name, resolution, latents.shape[-2:])
                             for path in paths]).unsqueeze(1)
        masks = (masks >= 0.5).float()
        for step in [0, *arguments.steps]:
            weight[-1] = initial if step == 0 else load_embedding(
                learned(arguments, data, concept, f"learned_embeds-steps-{step}"))[1][0]
            states = base.embed_text(arguments.prompt.replace("{}", TOKEN)).expand(len(paths), -1, -1)
            generator, totals = torch.Generator().manual_seed(arguments.seed), torch.zeros(2)
            for _ in range(arguments.draws):
                noise = torch.randn(latents.shape, generator=generator)
                timesteps = sample_timesteps(len(paths), 0, base.scheduler.config.num_train_timesteps,
                                             generator=generator)
                with torch.no_grad():
                    error = base.loss(latents, noise, timesteps, states)
                totals += torch.stack([masked_mean(error, mask, "area") for mask in (masks, 1 - masks)])
            of_concept.append((totals / arguments.draws).tolist())
        losses.append(of_concept)
    return {"steps": [0, *arguments.steps], "losses": losses}


def claims(results: dict) -> dict:
    import numpy as np

    found = {}
    for data, result in results.items():
        losses = np.array(result["losses"])  # (concepts, steps, 2)

        def reduction(rows, part):
            return 1 - rows[:, -1, part].mean() / rows[:, 0, part].mean()
        found |= {f"{data}: relative loss reduction inside":
                      estimate(losses, lambda rows: reduction(rows, 0)),
                  f"{data}: relative loss reduction outside":
                      estimate(losses, lambda rows: reduction(rows, 1)),
                  f"{data}: outside's reduction over inside's": estimate(
                      losses, lambda rows: reduction(rows, 1) / reduction(rows, 0))}
    return found


def draw(results: dict, path) -> None:
    import numpy as np

    from szt_utils.plots import COLOURS, save_figure, subplots

    drawn, axes = subplots(1, 2, sharey=True)
    for data, result in results.items():
        losses = np.array(result["losses"]).mean(0)
        for part, name in enumerate(("inside", "outside")):
            change = 100 * (losses[:, part] / losses[0, part] - 1)
            axes[0, part].plot(result["steps"], change, "o-", color=COLOURS[data], label=data, markersize=3)
            axes[0, part].set(title=f"{name} the concept", xlabel="training step",
                              ylabel="change of the loss, %")
    axes[0, 0].legend()
    save_figure(drawn, path)


if __name__ == "__main__":
    figure("fig6", __doc__, measure, claims, draw,
           {"steps": [25, 50, 75, 100, 125, 150], "draws": 16, "prompt": "a photo of a {}",
            "initializer": "object", "seed": 0}, DATA)
