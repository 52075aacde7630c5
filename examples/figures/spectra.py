"""Appendix D: power spectra of latents, of clean and poisoned pictures, before and after JPEG.

    python examples/figures/spectra.py --data_dir figures --output_dir figures

The claim (Sec. 4.4): poisons bend the latent's spectrum away from that of natural pictures, and JPEG bends
it back.
"""

from world import DATA, concepts_of, estimate, figure, load, load_model, pictures


def measure(arguments, data: str) -> dict:
    """Logarithms of the radial spectra of each picture, (pictures, bands), before and after JPEG."""
    import torch

    from szt_utils.evidence import radial_spectrum
    from szt_utils.jpeg import jpeg_tensor

    model, resolution = load_model(arguments)
    spectra, names = {"before": [], "after": []}, []
    for concept in concepts_of(arguments, data):
        for path in pictures(arguments.data_dir[0], data, concept):
            images = load([path], resolution)
            with torch.no_grad():
                latents = model.base.encode(torch.cat([images, jpeg_tensor(images, arguments.jpeg_quality)]))
            before, after = radial_spectrum(latents.float(), arguments.bands).log().tolist()
            spectra["before"].append(before)
            spectra["after"].append(after)
            names.append(f"{concept}/{path.stem}")
    return {**spectra, "names": names}


def claims(results: dict) -> dict:
    import numpy as np

    found, clean = {}, results["clean"]
    of_clean = dict(zip(clean["names"], clean["before"], strict=True))
    for data, result in results.items():
        rows = np.stack([np.array([of_clean[name], before, after]) for name, before, after in zip(
            result["names"], result["before"], result["after"], strict=True)])  # (N, 3, bands)

        def distance(rows, which):
            """Mean distance of the logarithms of the mean spectra: 0.69 is a factor of two."""
            return np.abs((rows[:, which] - rows[:, 0]).mean(0)).mean()
        if data != "clean":
            found[f"{data}: distance to clean, ln, before JPEG"] = estimate(rows, lambda r: distance(r, 1))
        found[f"{data}: distance to clean, ln, after JPEG"] = estimate(rows, lambda r: distance(r, 2))
        if data != "clean":
            found[f"{data}: share of the distance that JPEG removes"] = estimate(
                rows, lambda r: 1 - distance(r, 2) / distance(r, 1))
    return found


def draw(results: dict, path) -> None:
    import numpy as np

    from szt_utils.plots import COLOURS, save_figure, subplots

    drawn, axes = subplots(1, 2, sharey=True)
    for axis, when in zip(axes[0], ("before", "after"), strict=True):
        for data, result in results.items():
            spectrum = np.exp(np.mean(result[when], axis=0))
            middle = (np.arange(len(spectrum)) + 0.5) / len(spectrum)
            axis.plot(middle, spectrum, "o-", color=COLOURS[data], label=data, markersize=3)
        axis.set(title=f"{when} JPEG", xlabel="spatial frequency of the latent, of Nyquist's",
                 ylabel="power", yscale="log")
    axes[0, 1].legend()
    save_figure(drawn, path)


if __name__ == "__main__":
    figure("spectra", __doc__, measure, claims, draw, {"jpeg_quality": 25, "bands": 8}, DATA)
