"""Solid procedural textures: colour by the place on the object, band-limited to the pixel's footprint; no seams, no repeats."""

import colorsys
from dataclasses import dataclass

import numpy as np

SIDE = 32  # the noise lattice repeats after SIDE cells; every octave has its own shift
KINDS = ("cloud", "checker", "stripes", "blobs", "marble", "mosaic")


def _corner_table() -> np.ndarray:
    """Random lattice values in [-1, 1], for each cell at its eight corners: (8 * 2, SIDE^3) float32,
    row = corner (x*4 + y*2 + z) * 2 + channel.
    """
    values = np.random.default_rng(20240).uniform(-1, 1, (2, SIDE, SIDE, SIDE)).astype(np.float32)
    corners = [np.roll(values, (-(c >> 2), -(c >> 1 & 1), -(c & 1)), (1, 2, 3)) for c in range(8)]
    return np.ascontiguousarray(np.stack(corners).reshape(16, SIDE**3))


CORNERS = _corner_table()


def noise(q: np.ndarray, width=1.0) -> np.ndarray:
    """Two independent value noises (2, N) in [-1, 1] at q (3, N) float32, in cells.

    width (scalar or (N,)), in cells: how wide the transition between lattice values is; 1 gives smooth noise, towards 0 random
    tiles.
    """
    cell = np.floor(q)
    s = q - cell
    if np.ndim(width) or width != 1.0:
        s = np.clip((s - 0.5) / width + 0.5, 0, 1)
    s = s * s * (3 - 2 * s)
    i = cell.astype(np.intp) & (SIDE - 1)
    place = (i[0] * SIDE + i[1]) * SIDE + i[2]                    # always in range, so mode="clip" only spares the check
    v = CORNERS.take(place, axis=1, mode="clip").reshape(8, 2, -1)
    v = v[:4] + s[0] * (v[4:] - v[:4])
    v = v[:2] + s[1] * (v[2:] - v[:2])
    return v[0] + s[2] * (v[1] - v[0])


@dataclass
class Material:
    """A texture: kind, three colours (3, 3) in [0, 1], size of the pattern and of the finest grain in metres, strength of the
    grain, and its frame.
    """

    kind: str
    colours: np.ndarray
    size: float
    grain: float
    strength: float
    rotation: np.ndarray
    shift: np.ndarray


def random_material(rng: np.random.Generator, size: float, kind: str | None = None, vivid: float = 1.0) -> Material:
    """A material whose pattern is about `size` metres large; `vivid` scales saturation."""
    hue, value = rng.random(), rng.uniform(0.6, 1.0)
    other = hue + rng.choice([rng.normal(0, 0.06), rng.uniform(0.2, 0.8)])        # a shade of the same colour, or another one
    colours = [colorsys.hsv_to_rgb(hue, vivid * rng.uniform(0.05, 0.75), value),
               colorsys.hsv_to_rgb(other % 1, vivid * rng.uniform(0.1, 0.8), value * rng.uniform(0.3, 0.75)),
               colorsys.hsv_to_rgb(rng.random(), vivid * rng.uniform(0.0, 0.7), rng.uniform(0.4, 1.0))]
    kind = kind or str(rng.choice(KINDS))
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return Material(kind, np.array(colours, np.float32), size * rng.uniform(0.6, 1.4), size / 64, rng.uniform(0.4, 0.8),
                    (np.eye(3) if kind in ("checker", "mosaic") else q).astype(np.float32),
                    rng.uniform(-50, 50, 3).astype(np.float32))


def _square_wave(x, blur):
    """Square wave of period 2, values in [0, 1], its edges widened to `blur` (in units of x); the mean where blur is large."""
    edge = np.abs(x - 2 * np.floor(x / 2) - 1)                    # triangle in [0, 1], the jump at 0.5
    return 0.5 + np.clip((edge - 0.5) / blur.clip(0.02), -0.5, 0.5) * np.clip(2 - blur, 0, 1)


def albedo(m: Material, x: np.ndarray, footprint: np.ndarray) -> np.ndarray:
    """Colour (N, 3) float32 in [0, 1] at the places x (N, 3) float32; footprint (N,) is the size of a pixel there; metres."""
    x = m.rotation.T @ x.T                                        # (3, N): each coordinate contiguous
    q, blur = x / m.size + m.shift[:, None], footprint / m.size
    # Fractal noise: octaves from the pattern's size down to the grain, each faded out where it is finer than about a pixel.
    low = noise(q)
    detail, weight, total, cell = 0.35 * low, 0.5, 0.5, m.size
    finest = max(float(footprint.min()), m.grain)
    for octave in range(1, 9):
        cell /= 2
        if cell < finest:
            break
        fade = weight * np.clip(1.7 - 1.1 * footprint / cell, 0, 1)
        detail = detail + fade * noise(x / cell + m.shift[:, None] * (octave + 1.37))
        total += weight * weight
        weight *= 0.9
    detail = detail / np.sqrt(total)                              # about the same contrast whatever the number of octaves
    mix = _pattern(m.kind, q, low[0] * 0.6 + detail[0] * 0.5, blur)
    accent = np.clip((detail[1] - 0.25) * 2.5, 0, 0.7)
    first, second, third = m.colours[:, :, None]                  # (3, 1) each
    colour = first + mix * (second - first)
    colour = colour + accent * (third - colour)
    return np.clip(colour * (1 + m.strength * detail[0]), 0, 1).T


def _pattern(kind: str, q, field, blur) -> np.ndarray:
    """Share of the second colour (N,) in [0, 1]: q (3, N) in pattern sizes, field (N,) noise about [-1, 1], blur (N,) a pixel in
    pattern sizes.
    """
    if kind == "checker":
        waves = [2 * _square_wave(2 * q[k], 2 * blur) - 1 for k in range(3)]
        return 0.5 + 0.5 * waves[0] * waves[1] * waves[2]
    if kind == "stripes":
        return _square_wave(3 * q[0] + 0.5 * field, 3 * blur)
    if kind == "marble":
        return 0.5 + 0.5 * np.sin(4 * q[0] + 5 * field)
    if kind == "blobs":
        return np.clip(field / (0.1 + blur) + 0.5, 0, 1)
    if kind == "mosaic":
        tiles = noise(2.5 * q, np.clip(2.5 * blur, 0.04, 1))[0]
        return np.clip(0.5 + 0.9 * tiles * np.clip(2 - 2.5 * blur, 0, 1), 0, 1)
    return np.clip(0.5 + field, 0, 1)
