"""Fig. 4: the denoising loss over timesteps, clean and poisoned: median, middle 50 % and 95 % of pictures.

    python examples/figures/fig4.py --data_dir figures figures-more --output_dir figures

The claim (Sec. 4.2): the loss falls from t = 0 to nothing at the end, and poisons raise it at lower and
middle timesteps only.
"""

from world import DATA, concepts_of, estimate, figure, load, load_model, pictures


def measure(arguments, data: str) -> dict:
    """Losses (pictures, timesteps); the same noise for a picture in every data set."""
    import torch

    model, resolution = load_model(arguments)
    last = model.base.scheduler.config.num_train_timesteps - 1
    timesteps = torch.linspace(0, last, arguments.timesteps).round().long()
    states = model.base.embed_text(arguments.prompt).expand(len(timesteps), -1, -1)
    losses, names = [], []
    for folder in arguments.data_dir:
        if not (folder / data).is_dir():
            continue
        for concept in concepts_of(arguments, data):
            for path in pictures(folder, data, concept):
                latents = model.base.encode(load([path], resolution)).detach()
                generator = torch.Generator().manual_seed(arguments.seed + len(losses))
                noise = torch.randn(latents.shape, generator=generator)
                with torch.no_grad():
                    loss = model.base.loss(latents.expand(len(timesteps), -1, -1, -1),
                                           noise.expand(len(timesteps), -1, -1, -1), timesteps, states)
                losses.append([round(value, 6) for value in loss.flatten(1).mean(1).tolist()])
                names.append(f"{folder.name}/{concept}/{path.stem}")
    return {"timesteps": timesteps.tolist(), "losses": losses, "names": names}


def claims(results: dict) -> dict:
    import numpy as np

    clean, timesteps = results["clean"], np.array(results["clean"]["timesteps"])
    losses = np.array(clean["losses"])
    ranks = np.median(losses, 0).argsort().argsort()
    found = {"pictures": float(len(losses)),
             "clean: Spearman correlation of median loss and timestep":
                 float(np.corrcoef(ranks, np.arange(len(timesteps)))[0, 1]),
             "clean: mean loss at the last timestep over that at the first":
                 estimate(losses, lambda rows: rows[:, -1].mean() / rows[:, 0].mean())}
    of_name = dict(zip(clean["names"], losses, strict=True))
    for data, result in results.items():
        if data == "clean":
            continue
        pairs = np.stack([np.stack([of_name[name], np.array(row)]) for name, row in
                          zip(result["names"], result["losses"], strict=True)])  # (N, 2, timesteps)

        def below(rows):
            """The timestep below which 90 % of the absolute change of the mean loss lies, interpolated."""
            change = np.abs((rows[:, 1] - rows[:, 0]).mean(0)).cumsum()
            return np.interp(0.9 * change[-1], change, timesteps)

        def increase(rows, low, high):
            at = (timesteps >= low) & (timesteps < high)
            return rows[:, 1, at].mean() / rows[:, 0, at].mean() - 1
        found |= {f"{data}: timestep below which 90 % of the loss change lies": estimate(pairs, below),
                  f"{data}: relative loss increase at t = 0":
                      estimate(pairs, lambda rows: increase(rows, 0, 1)),
                  f"{data}: relative loss increase at t < 500":
                      estimate(pairs, lambda rows: increase(rows, 0, 500)),
                  f"{data}: relative loss increase at t >= 700":
                      estimate(pairs, lambda rows: increase(rows, 700, 10_000))}
    return found


def draw(results: dict, path) -> None:
    import numpy as np

    from szt_utils.plots import COLOURS, band_plot, save_figure, subplots

    poisons = [data for data in results if data != "clean"]
    columns = min(3, max(1, len(poisons)))
    rows = -(-max(1, len(poisons)) // columns)
    drawn, axes = subplots(rows, columns, sharey=True)
    for axis, data in zip(axes.flat, poisons or ["clean"], strict=False):
        for name in dict.fromkeys(["clean", data]):
            band_plot(axis, results[name]["timesteps"], np.array(results[name]["losses"]),
                      f"{name} ({len(results[name]['losses'])})", COLOURS[name])
        axis.set(xlabel="timestep", ylabel="denoising loss", yscale="log", title=data)
        axis.legend()
    for axis in list(axes.flat)[len(poisons) or 1:]:
        axis.set_visible(False)
    save_figure(drawn, path)


if __name__ == "__main__":
    figure("fig4", __doc__, measure, claims, draw, {"timesteps": 21, "prompt": "a photo", "seed": 0}, DATA)
