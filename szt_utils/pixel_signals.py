"""Signals of poison in the pixels of an image at full size, from small blocks and without a model.

Within a small block, the colors of a photograph lie along a line or in a plane, so one direction of color
holds hardly more than noise. A poison moves the channels one by one and fills that direction too: evenly over
smooth and busy blocks, and with another spectrum than sensor noise, JPEG or interpolation leave there.
"""

import numpy as np

__all__ = ["FEWEST_BLOCKS", "SIGNALS", "pixel_signals"]

SIGNALS = ("floor", "strongest_floor", "following", "quiet_tilt_low", "quiet_tilt_mid", "quiet_tilt_high",
           "kurtosis", "tilt_mid", "tilt_high")
SIDE = 16  # of a block, in pixels
FEWEST_BLOCKS = 36  # 96 x 96 pixels; with fewer, the shares below are of a handful of blocks
MOST_BLOCKS = 4096  # 1 megapixel; of a larger image, blocks at equal distances
DARKEST, BRIGHTEST, CLIPPED = 2, 253, 0.25  # a block with more clipped values than this share is left out
OFFSET = 0.3  # levels, about what rounding to whole levels adds: keeps logarithms of still blocks finite
STILL = 0.2  # levels; a block whose weakest direction holds less has no spectrum to speak of
BANDS = (0.05, 0.125, 0.25, 0.375, 0.8)  # cycles per pixel; the last one includes the corners


def pixel_signals(levels: np.ndarray) -> list[float] | None:
    """The signals of an image (H, W, 3) of levels 0 to 255, in the order of SIGNALS; None if it has none.

    Every block of 16 px loses a quadratic surface per channel; the rest is turned into the block's own
    three directions of color, of which the weakest has the least power. Quiet blocks are the tenth with the
    least power in all three. In nepers:
    floor             level of the weakest direction, 10th percentile over the blocks
    strongest_floor   level of the strongest direction, 10th percentile
    following         slope of the weakest level over the strongest: 0 if it is even, 1 if it follows
    quiet_tilt_*      spectrum of the weakest direction in quiet blocks: each band against the one below
    kurtosis          of the channels in quiet blocks: ln 3 for Gaussian noise, less for two levels
    tilt_*            as quiet_tilt_*, over all blocks
    None when fewer than 36 blocks are unclipped, or their weakest direction is still: small, flat or grey.
    """
    blocks = _blocks(np.asarray(levels, np.float32))
    if len(blocks) < FEWEST_BLOCKS:
        return None
    rest = _without_surface(blocks)
    power, turned = _directions(rest)
    level = np.log(power + OFFSET)
    lively = np.flatnonzero(power[:, 0] > STILL)
    if len(lively) < FEWEST_BLOCKS:
        return None
    quiet = lively[np.argsort(level[lively].sum(1), kind="stable")[:max(len(lively) // 10, SIDE)]]
    low, high = (np.percentile(level[:, direction], 10) for direction in (0, 2))
    values = [low, high, _slope(level[:, 2], level[:, 0]), *_tilts(turned[quiet, 0]),
              _log_kurtosis(rest[quiet]), *_tilts(turned[lively, 0])[1:]]
    return [float(value) for value in values]


def _blocks(levels: np.ndarray) -> np.ndarray:
    """The unclipped blocks of an image, (N, 3, 256), at most MOST_BLOCKS."""
    rows, columns = (length // SIDE for length in levels.shape[:2])
    blocks = levels[:rows * SIDE, :columns * SIDE].reshape(rows, SIDE, columns, SIDE, 3)
    blocks = blocks.transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIDE**2)
    clipped = (blocks <= DARKEST) | (blocks >= BRIGHTEST)
    blocks = blocks[clipped.mean((1, 2)) <= CLIPPED]
    if len(blocks) > MOST_BLOCKS:
        blocks = blocks[np.linspace(0, len(blocks) - 1, MOST_BLOCKS).astype(int)]
    return blocks


def _without_surface(blocks: np.ndarray) -> np.ndarray:
    """Blocks (N, 3, 256) minus the quadratic surface that fits each channel best."""
    y, x = np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 2, indexing="ij")
    surface, _ = np.linalg.qr(np.stack([x**0, x, y, x * y, x**2, y**2], -1).reshape(-1, 6))
    surface = surface.astype(np.float32)
    return blocks - (blocks @ surface) @ surface.T


def _directions(rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels (N, 3) of every block's principal directions of color, weakest first, and the blocks in them."""
    covariance = np.einsum("nip,njp->nij", rest, rest) / (SIDE**2 - 6)
    power, axes = np.linalg.eigh(covariance.astype(np.float64))
    return np.sqrt(power.clip(min=0)), np.einsum("nij,nip->njp", axes.astype(np.float32), rest)


def _tilts(blocks: np.ndarray) -> np.ndarray:
    """ln power of each band against the band below, (3,), of blocks (N, 256) at equal weight."""
    blocks = _unit(blocks).reshape(-1, SIDE, SIDE) * np.outer(*[np.hanning(SIDE + 2)[1:-1]] * 2)
    power = (np.abs(np.fft.rfft2(blocks)) ** 2).mean(0)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    bands = [power[(frequency >= low) & (frequency < high)].mean()
             for low, high in zip(BANDS[:-1], BANDS[1:], strict=True)]
    return np.diff(np.log(np.array(bands) + 0.05))


def _log_kurtosis(rest: np.ndarray) -> float:
    """Mean ln kurtosis over the blocks and channels of (N, 3, 256)."""
    return np.log((_unit(rest) ** 4).mean(-1) + 1e-3).mean()


def _unit(blocks: np.ndarray) -> np.ndarray:
    """Blocks (..., 256) at unit power; what is weaker than STILL stays weak."""
    return blocks / np.sqrt((blocks**2).mean(-1, keepdims=True) + STILL**2 / 4)


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Slope of the line through y over x by least squares, 0 where x is constant."""
    x = x - x.mean()
    return float(x @ y / max(x @ x, 1e-9))
