"""Fig. 7 and 12: histograms of pixel perturbations, relative to the clean pictures, before and after JPEG.

    python examples/figures/fig7.py --data_dir figures --output_dir figures

The claim (Sec. 4.4): poisons' perturbations are bimodal, at the ends of their budget; after JPEG they are
unimodal, like a Gaussian.
"""

from world import DATA, concepts_of, estimate, figure, load, pictures


def measure(arguments, data: str) -> dict:
    """Counts of changes from -64 to 64 levels, (pictures, 129), before and after JPEG."""
    import torch

    from szt_utils.images import read_image
    from szt_utils.jpeg import jpeg_tensor

    counts = {"before": [], "after": []}
    folder = arguments.data_dir[0]
    for concept in concepts_of(arguments, data):
        for path in pictures(folder, data, concept):
            resolution = read_image(path).width
            poisoned = load([path], resolution)
            clean = load([folder / "clean" / concept / path.name], resolution)
            for name, change in (("before", poisoned - clean),
                                 ("after", jpeg_tensor(poisoned, arguments.jpeg_quality) - clean)):
                levels = (change * 255).round().clamp(-64, 64).long().flatten() + 64
                counts[name].append(torch.bincount(levels, minlength=129).tolist())
    return counts


def moments(counts):
    """Excess kurtosis and Sarle's bimodality coefficient of a histogram over -64..64."""
    import numpy as np

    weights, levels = counts / counts.sum(), np.arange(-64, 65)
    centred = levels - (weights * levels).sum()
    variance = (weights * centred**2).sum()
    kurtosis = (weights * centred**4).sum() / variance**2
    skewness = (weights * centred**3).sum() / variance**1.5
    return kurtosis - 3, (skewness**2 + 1) / kurtosis


def claims(results: dict) -> dict:
    import numpy as np

    found = {}
    for data, result in results.items():
        for when in ("before", "after") if data != "clean" else ("after",):
            counts = np.array(result[when], dtype=float)
            of = "JPEG of clean" if data == "clean" else f"{data} {when} JPEG"
            found[f"{of}: excess kurtosis"] = estimate(counts, lambda rows: moments(rows.sum(0))[0])
            found[f"{of}: bimodality coefficient"] = estimate(counts, lambda rows: moments(rows.sum(0))[1])
            if data != "clean":
                end = np.flatnonzero(np.array(results[data]["before"]).sum(0))[-1] - 64  # eps
                found[f"{of}: share within 2 levels of the budget's ends"] = estimate(
                    counts, lambda rows, end=end: rows[:, np.abs(np.abs(np.arange(-64, 65)) - end) <= 2].sum()
                    / rows.sum())
    return found


def draw(results: dict, path) -> None:
    import numpy as np

    from szt_utils.plots import save_figure, step_plot, subplots

    poisons = [data for data in results if data != "clean"]
    columns = min(3, max(1, len(poisons)))
    rows = -(-max(1, len(poisons)) // columns)
    drawn, axes = subplots(rows, columns, sharex=True)
    edges = np.arange(-64.5, 65)
    for axis, data in zip(axes.flat, poisons, strict=False):
        for when, colour in (("before", "#D55E00"), ("after", "#009E73")):
            counts = np.array(results[data][when]).sum(0)
            step_plot(axis, edges, counts / counts.sum(), f"{when} JPEG", colour)
        axis.set(title=data, xlabel="change in levels of 255", ylabel="share of values", xlim=(-40, 40))
        axis.legend()
    for axis in list(axes.flat)[len(poisons):]:
        axis.set_visible(False)
    save_figure(drawn, path)


if __name__ == "__main__":
    figure("fig7", __doc__, measure, claims, draw, {"jpeg_quality": 25}, DATA)
