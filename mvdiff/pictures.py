"""Single pictures: preparation of an input picture, resizing, rounding to 8 bits, grids."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvdiff.clip import resize_shorter_side

BACKGROUNDS = {"white": 1.0, "gray": 0.5, "black": 0.0}


def background_color(name: str | float, rng: np.random.Generator | None = None) -> np.ndarray:
    """(3,) float32 in [0,1]: white, gray, black, a number, "random" (three uniforms), "three_choices" (one of the named)."""
    if name in ("random", "three_choices") and rng is None:
        raise ValueError(f"bg_color {name}: give one colour here, {', '.join(BACKGROUNDS)} or a number")
    if name == "random":
        return rng.random(3).astype(np.float32)
    if name == "three_choices":
        name = tuple(BACKGROUNDS)[int(rng.integers(3))]
    try:
        value = BACKGROUNDS[name] if name in BACKGROUNDS else float(name)
    except (TypeError, ValueError):
        value = -1
    if not 0 <= value <= 1:
        known = f"{', '.join(BACKGROUNDS)}, random, three_choices and numbers in [0,1]"
        raise ValueError(f"bg_color {name!r}: known are {known}")
    return np.full(3, value, np.float32)


def picture_names(files: list[Path]) -> list[str]:
    """A name for each picture: its file's stem, or the whole file name where others have the same stem."""
    count = Counter(file.stem for file in files)
    return [file.stem if count[file.stem] == 1 else file.name for file in files]


def resize_square(image: Image.Image, size: int) -> Image.Image:
    """Resize a square picture to (size,size) by PIL's antialiased bicubic, with colours weighted by alpha where there is one.

    Where the sides divide, only the box of what is not zero is resized, with the filter's reach around it: the rest stays zero.
    """
    if image.size == (size, size):
        return image
    scale, rest = divmod(image.width, size)
    box = image.getbbox(alpha_only=False) if scale and not rest else None
    if box is None:
        return image.resize((size, size), Image.Resampling.BICUBIC)
    # An output pixel sees 2.5 pixels of the output's size to each side; as much again keeps the crop's own edge out of sight
    x0, y0 = (max(0, lo // scale - 5) for lo in box[:2])
    x1, y1 = (min(size, hi // scale + 6) for hi in box[2:])
    part = image.crop((x0 * scale, y0 * scale, x1 * scale, y1 * scale))
    part = part.convert("RGBa") if image.mode == "RGBA" else part  # colours times alpha
    # In two passes, because PIL takes a narrow picture's columns first and a square one's rows: each pass rounds to 8 bits
    part = part.resize((x1 - x0, part.height), Image.Resampling.BICUBIC).resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC)
    out = Image.new(image.mode, (size, size))
    out.paste(part.convert(image.mode), (x0, y0))
    return out


def fit_square(image: Image.Image, size: int, center: bool = True, rng: np.random.Generator | None = None) -> Image.Image:
    """Resize the shorter side to `size` (bilinear, antialiased) and crop a square: the centre, or a window drawn from `rng`."""
    image = resize_shorter_side(image, size, Image.Resampling.BILINEAR)
    if center:  # Python's round: halves go to the even offset
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    else:
        left, top = int(rng.integers(image.width - size + 1)), int(rng.integers(image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def prepare_input(
    image: Image.Image,
    size: int,
    crop_size: int = 192,
    bg_color: str | float = "white",
    crop_inclusive: bool = True,
    assume_foreground: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Input picture with alpha -> (image (3,size,size), alpha (1,size,size)), float32 in [0,1].

    The box of alpha > 0 is scaled so that its longer side is `crop_size`, and centred; `crop_size` -1 keeps the framing and pads
    to a square. `crop_inclusive` False loses the last row and column of the box, as the published sampler does. ValueError for a
    picture without alpha (unless `assume_foreground`: all of it is the object), and for one that is transparent throughout.
    """
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info and not assume_foreground:
        raise ValueError("the picture has no alpha channel: cut the object out first, or use --assume_foreground")
    image = image.convert("RGBA")
    if crop_size != -1:
        if not 0 < crop_size <= size:
            raise ValueError(f"crop_size {crop_size} must be -1 or between 1 and the image size {size}")
        rows, columns = np.nonzero(np.asarray(image)[..., 3])
        if not len(rows):
            raise ValueError("the picture is transparent throughout")
        x0, y0 = columns.min(), rows.min()
        x1, y1 = columns.max() + crop_inclusive, rows.max() + crop_inclusive
        if x1 <= x0 or y1 <= y0:
            raise ValueError("the object is one pixel wide or high")
        scale = crop_size / max(x1 - x0, y1 - y0)
        shape = max(1, int(scale * (x1 - x0))), max(1, int(scale * (y1 - y0)))
        image = image.crop((x0, y0, x1, y1)).resize(shape, Image.Resampling.BICUBIC)
    side = max(image.size) if crop_size == -1 else size
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(canvas.resize((size, size), Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1) / 255
    if not pixels[3].any():
        raise ValueError("the picture is transparent throughout")
    rgb, alpha = pixels[:3], pixels[3:]
    return rgb * alpha + background_color(bg_color)[:, None, None] * (1 - alpha), alpha


def round_uint8(images: Tensor) -> Tensor:
    """[0,1] -> uint8, rounded half up and clamped: for everything that is written or shown."""
    return (images * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def grid(images: Tensor, per_row: int) -> Tensor:
    """(N,C,H,W) -> (C, rows * H, per_row * W), without padding; missing pictures of the last row are 0."""
    n, c, h, w = images.shape
    rows = -(-n // per_row)
    full = torch.cat([images, images.new_zeros(rows * per_row - n, c, h, w)])
    return full.view(rows, per_row, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, rows * h, per_row * w)
