"""The data pipeline of MoGe between reading an instance and batching it: pure functions of arrays and one numpy Generator.

A random view is cut out of the image (another camera at the same place: a homography), image, depth and normals are warped to
it, flipped and the colours disturbed. Conventions as in `moge.geometry`; images are uint8 RGB (H, W, 3), depth float32 (H, W)
with NaN unknown and inf infinitely far. Drawn in a fixed order, so that an instance follows from its generator's seed.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

from moge.geometry import depth_edge, depth_to_points, image_uv, masked_nearest_resize, points_to_normal

AUGMENTATIONS = ("jittering", "dof", "shot_noise", "blurring", "jpeg_loss")


def _fov(focal: float) -> float:
    return 2 * math.atan(0.5 / focal)


def _focal(fov: float) -> float:
    return 0.5 / math.tan(fov / 2)


def sample_perspective(
    K: np.ndarray,
    tgt_aspect: float,
    center_augmentation: float,
    fov_range_absolute: Sequence[float],
    fov_range_relative: Sequence[float],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a view that lies inside the image of a camera K (3, 3; normalised): (its intrinsics, rotation R from old to new
    camera axes).

    tgt_aspect: width / height of the new view. center_augmentation 0..1: how far its centre may leave the image centre, of what
    the field of view leaves room for. fov_range_absolute: horizontal field of view in degrees; fov_range_relative: as a share
    of the source's. Both float32. The absolute maximum holds here; the published code computes it but never uses it.
    """
    K = np.asarray(K, np.float64)
    fov_x, fov_y = _fov(K[0, 0]), _fov(K[1, 1])

    def widest(share: float) -> float:
        """Largest horizontal field of view within `share` of the source's in both directions."""
        return min(share * fov_x, _fov(_focal(share * fov_y) / tgt_aspect))

    lo = max(math.radians(fov_range_absolute[0]), widest(fov_range_relative[0]))
    hi = min(math.radians(fov_range_absolute[1]), widest(fov_range_relative[1]))
    tgt_fov_x = rng.uniform(min(lo, hi), hi)
    tgt_fov_y = _fov(_focal(tgt_fov_x) * tgt_aspect)
    dtheta = center_augmentation * rng.uniform(-0.5, 0.5) * (fov_x - tgt_fov_x)
    dphi = center_augmentation * rng.uniform(-0.5, 0.5) * (fov_y - tgt_fov_y)
    centre = 0.5 + 0.5 * math.tan(dtheta) / math.tan(fov_x / 2), 0.5 + 0.5 * math.tan(dphi) / math.tan(fov_y / 2)
    R = rotation_to_centre(K, centre)
    view = fit_view(K, R, tgt_aspect, 2 * math.tan(tgt_fov_x / 2), 2 * math.tan(tgt_fov_y / 2))
    return view.astype(np.float32), R.astype(np.float32)


def rotation_to_centre(K: np.ndarray, uv: tuple[float, float]) -> np.ndarray:
    """Smallest rotation (3, 3) that turns the ray through (u, v) of camera K into the optical axis."""
    d = np.linalg.inv(K) @ np.array([*uv, 1.0])
    d = d / np.linalg.norm(d)
    v = np.cross(d, (0.0, 0.0, 1.0))
    S = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    return np.eye(3) + S + S @ S / (1 + d[2])


def fit_view(K: np.ndarray, R: np.ndarray, aspect: float, horizontal: float, vertical: float) -> np.ndarray:
    """Intrinsics (3, 3) of the largest view of this aspect that shows only what camera K sees, seen after rotation R.

    horizontal, vertical: upper limits of its size on the plane z = 1. The view is shrunk until its diagonals stay within the
    lines through the edges of the image.
    """
    corners = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0, 1]], np.float64) @ (R @ np.linalg.inv(K)).T
    corners = corners[:, :2] / corners[:, 2:]
    for a, b in zip(corners, np.roll(corners, -1, axis=0)):
        for diagonal in ((aspect, 1.0), (aspect, -1.0)):
            # a + k (b - a) = m diagonal
            matrix = np.stack([b - a, -np.array(diagonal)], 1)
            if abs(np.linalg.det(matrix)) < 1e-12:
                continue
            m = np.linalg.solve(matrix, -a)[1]
            horizontal, vertical = min(horizontal, 2 * abs(m * aspect)), min(vertical, 2 * abs(m))
    return np.array([[1 / horizontal, 0, 0.5], [0, 1 / vertical, 0.5], [0, 0, 1]])


def _pixel_matrix(T: np.ndarray, source: tuple[int, int], target: tuple[int, int]) -> np.ndarray:
    """Homography between pixel indices (x, y, 1) from one between (u, v, 1); source, target: (height, width)."""
    (h, w), (th, tw) = source, target
    to_uv = np.array([[1 / w, 0, 0.5 / w], [0, 1 / h, 0.5 / h], [0, 0, 1]])
    return np.array([[tw, 0, -0.5], [0, th, -0.5], [0, 0, 1]]) @ T @ to_uv


def warp(values: np.ndarray, T: np.ndarray, size: tuple[int, int], mode: str, valid: np.ndarray | None = None) -> np.ndarray:
    """Warp a map by T, which takes homogeneous (u, v, 1) of the source to the target; size: (height, width); zero outside.

    mode: nearest, bilinear or lanczos. A map that has to shrink is first resized: lanczos by Pillow to 1.25 times the final
    scale, nearest (with a validity mask) by mask-aware picking, NaN where a window holds no valid pixel.
    """
    h, w = values.shape[:2]
    P = _pixel_matrix(T, (h, w), size)
    inverse = np.linalg.inv(P)
    q = inverse[2] @ np.array([size[1] / 2, size[0] / 2, 1])
    sx, sy = q * np.linalg.norm(P[:2, :2], axis=0)  # target pixels per source pixel at the target's centre
    if mode == "lanczos" and min(sx, sy) < 0.8:
        new = max(round(w * sx * 1.25), 16), max(round(h * sy * 1.25), 16)
        values = np.asarray(Image.fromarray(values).resize(new, Image.Resampling.LANCZOS))
    elif mode == "nearest" and valid is not None and min(sx, sy) < 1:
        new = max(round(h * sy), 16), max(round(w * sx), 16)
        mask, index = masked_nearest_resize(torch.from_numpy(valid), new)
        values = np.where(mask.numpy(), values.reshape(-1)[index.numpy()], np.nan).astype(values.dtype)
    if values.shape[:2] != (h, w):
        P = _pixel_matrix(T, values.shape[:2], size)
    flag = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "lanczos": cv2.INTER_LANCZOS4}[mode]
    return cv2.warpPerspective(values, P, (size[1], size[0]), flags=flag, borderMode=cv2.BORDER_CONSTANT)


def in_bands(f, depth: np.ndarray, margin: int, rows: int = 64) -> np.ndarray:
    """f(band, its first row) of a depth map, for an f that looks `margin` rows around a pixel; bands stay in the cache."""
    parts = []
    for top in range(0, len(depth), rows):
        start = max(top - margin, 0)
        parts.append(f(depth[start : top + rows + margin], start)[top - start : top - start + rows])
    return np.concatenate(parts)


def depth_normals(depth: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Normals (H, W, 3) float32 of a depth map (H, W), NaN where unknown or more than 88 degrees off the viewing ray."""
    H, W = depth.shape
    uv = image_uv(W, H)
    ray = torch.cat([uv, torch.ones_like(uv[..., :1])], -1) @ torch.linalg.inv(torch.from_numpy(K)).T

    def normals(band: np.ndarray, start: int) -> np.ndarray:
        z = torch.from_numpy(band)
        normal, known = points_to_normal(ray[start : start + len(band)] * z[..., None], z.isfinite(), 88)
        return torch.where(known[..., None], normal, torch.nan).numpy()

    return in_bands(normals, depth, margin=1)


def warp_depth(depth: np.ndarray, T: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Warp a depth map, as in `warp`, to z depth in the new camera. On smooth surfaces bilinear in disparity, which keeps
    planes plane; at edges and beside unknown pixels nearest. NaN where unknown, also where the target looks beside the source.
    """
    known = np.isfinite(depth)

    def edges(band: np.ndarray, start: int) -> np.ndarray:
        z = torch.from_numpy(band)
        return depth_edge(z, z.isfinite(), kernel=5, ltol=0.01).numpy()

    smooth = warp((known & ~in_bands(edges, depth, margin=4)).astype(np.float32), T, size, "bilinear")
    with np.errstate(divide="ignore", invalid="ignore"):
        linear = 1 / warp(1 / depth, T, size, "bilinear")
    nearest = warp(depth, T, size, "nearest", ~np.isnan(depth))
    warped = np.where(smooth == 1, linear, nearest)
    h, w = size
    row = np.linalg.inv(T)[2]
    u, v = (np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h
    warped = (warped / (row[0] * u + row[1] * v[:, None] + row[2])).astype(np.float32)
    return np.where(warped > 0, warped, np.float32(np.nan))  # 0: beside the source


def process_instance(
    instance: dict,
    width: int,
    height: int,
    rng: np.random.Generator,
    center_augmentation: float = 0.5,
    fov_range_absolute: Sequence[float] = (1, 179),
    fov_range_relative: Sequence[float] = (0.01, 1.0),
    image_augmentation: Sequence[str] = ("jittering", "jpeg_loss", "blurring"),
    clamp_max_depth: float = 1000.0,
    depth_unit: float | None = None,
    finite_depth_mask: str | None = None,
    normals: bool = True,
) -> dict:
    """Training sample of width x height from an instance {image (h, w, 3) uint8, depth (h', w') float32, intrinsics (3, 3),
    label_type}.

    The defaults are the training configuration. depth_unit: metres per unit of the stored depth; makes the sample metric.
    finite_depth_mask "only_known": unknown pixels are no positive examples of the mask. normals False: leaves out `normal`,
    and all else is the same. Returns image (H, W, 3) uint8, depth (H, W) float32, depth_mask_fin, depth_mask_inf (H, W) bool,
    normal (H, W, 3) float32 (NaN unknown), intrinsics (3, 3) float32, label_type (str; "invalid" when hardly any depth is
    left), is_metric (bool).
    """
    image, raw, K = instance["image"], np.asarray(instance["depth"], np.float32), np.asarray(instance["intrinsics"], np.float32)
    size, label_type = (height, width), instance["label_type"]
    K_new, R = sample_perspective(K, width / height, center_augmentation, fov_range_absolute, fov_range_relative, rng)
    T = K_new.astype(np.float64) @ R.astype(np.float64) @ np.linalg.inv(K.astype(np.float64))

    image = warp(image, T, size, "lanczos")
    depth = warp_depth(raw, T, size)
    normal = warp(depth_normals(raw, K), T, size, "bilinear") @ R.T if normals else None
    if np.isfinite(depth).mean() < 0.001:
        depth, label_type = np.ones(size, np.float32), "invalid"
    if rng.choice([True, False]):
        image, depth = image[:, ::-1], depth[:, ::-1]
        normal = normal[:, ::-1] * np.array([-1, 1, 1], np.float32) if normals else None
    image = augment_colors(np.ascontiguousarray(image), np.ascontiguousarray(depth), image_augmentation, rng)
    if depth_unit is not None:
        depth = depth * np.float32(depth_unit)
    finite = np.isfinite(depth)
    limit = clamp_max_depth * np.quantile(depth[finite], 0.01)
    depth = np.where(finite, np.clip(depth, 0, limit), depth).astype(np.float32)
    infinite = np.isinf(depth)
    out = {
        "image": image,
        "depth": depth,
        "depth_mask_fin": finite if finite_depth_mask == "only_known" else ~infinite,
        "depth_mask_inf": infinite,
        "intrinsics": K_new,
        "label_type": label_type,
        "is_metric": depth_unit is not None,
    }
    return out | ({"normal": np.ascontiguousarray(normal, np.float32)} if normals else {})


def prepare_evaluation(
    instance: dict,
    width: int,
    height: int,
    depth_unit: float | None = None,
    drop_max_depth: float = 1000.0,
    max_segments: int = 100,
    min_seg_area: int = 1000,
    rng: np.random.Generator | None = None,
) -> dict:
    """Evaluation sample of width x height: the largest view of that aspect which looks at the image centre.

    instance: {image (h, w, 3) uint8, depth (h', w') float32, intrinsics (3, 3)} and, optionally, segmentation (h'', w'') and
    labels {name: id}. Depth beyond drop_max_depth times the 1 % quantile is dropped; depth_unit: metres per unit, makes the
    sample metric. Of the labels the max_segments largest of at least min_seg_area pixels are kept, without undefined,
    unannotated, background, sky. Returns image (H, W, 3) uint8, depth (H, W), points (H, W, 3) float32 (1 and its ray where
    unknown), depth_mask, depth_mask_inf (H, W) bool, intrinsics (3, 3), is_metric, has_depth, and segmentation (H, W), labels
    where given. Without any depth (has_depth False) the mask is full, the depth 1. rng: draw the view instead, as in training,
    with half to all of the source's field of view (the crops of the MoGe-1 paper's tests of the field of view).
    """
    K = np.asarray(instance["intrinsics"], np.float64)
    aspect, fx, fy = width / height, K[0, 0], K[1, 1]
    if rng is None:
        R, wide = rotation_to_centre(K, (0.5, 0.5)), min(1 / fx, aspect / fy)
        K_new = fit_view(K, R, aspect, wide, wide / aspect)
    else:
        K_new, R = sample_perspective(K, aspect, 0.5, (1, 179), (0.5, 1), rng)
    K_new = K_new.astype(np.float32).astype(np.float64)
    # resampled to the target's angular pixel size first
    size = int(height * K_new[1, 1] / fy), int(width * K_new[0, 0] / fx)
    image = np.asarray(Image.fromarray(instance["image"]).resize(size[::-1], Image.Resampling.LANCZOS))
    raw = torch.from_numpy(np.asarray(instance["depth"], np.float32))
    mask, index = masked_nearest_resize(raw.isfinite(), size)
    mask_inf, _ = masked_nearest_resize(raw.isinf(), size)
    depth = torch.where(mask, raw.flatten()[index], 1.0)
    distance = depth_to_points(depth, torch.from_numpy(K).float()).norm(dim=-1).numpy()

    u, v = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(K_new).T  # (H, W, 3)
    at = rays @ (K @ R.T).T
    x = (at[..., 0] / at[..., 2] * size[1] - 0.5).astype(np.float32)
    y = (at[..., 1] / at[..., 2] * size[0] - 0.5).astype(np.float32)
    image = cv2.remap(image, x, y, cv2.INTER_LINEAR)

    def pick(values: np.ndarray) -> np.ndarray:
        return cv2.remap(values, x, y, cv2.INTER_NEAREST)

    mask, mask_inf = pick(mask.numpy().astype(np.uint8)) > 0, pick(mask_inf.numpy().astype(np.uint8)) > 0
    depth = (pick(distance) / np.linalg.norm(rays, axis=-1)).astype(np.float32)
    has_depth = bool(mask.any())
    if has_depth:
        mask &= depth <= drop_max_depth * np.quantile(depth[mask], 0.01)
        depth = depth * np.float32(1 if depth_unit is None else depth_unit)
    else:
        mask[:], depth[:] = True, 1
    depth = np.where(mask, depth, np.float32(1))
    out = {
        "image": image,
        "depth": depth,
        "points": (rays * depth[..., None]).astype(np.float32),
        "depth_mask": mask,
        "depth_mask_inf": mask_inf,
        "intrinsics": K_new.astype(np.float32),
        "is_metric": depth_unit is not None,
        "has_depth": has_depth,
    }
    if instance.get("segmentation") is not None:
        segmentation = pick(cv2.resize(instance["segmentation"], size[::-1], interpolation=cv2.INTER_NEAREST))
        ignored = ("undefined", "unannotated", "background", "sky")
        areas = {name: int((segmentation == i).sum()) for name, i in instance["labels"].items() if name not in ignored}
        kept = sorted((name for name in areas if areas[name] >= min_seg_area), key=lambda name: -areas[name])[:max_segments]
        out |= {"segmentation": segmentation, "labels": {name: instance["labels"][name] for name in kept}}
    return out


def augment_colors(image: np.ndarray, depth: np.ndarray, names: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """Disturb an image (H, W, 3) uint8 with the named AUGMENTATIONS, in their fixed order; all but jittering with probability
    1/2.

    depth (H, W): for the depth of field.
    """
    h, w = image.shape[:2]
    if "jittering" in names:
        image = jitter(image, *rng.uniform(0.9, 1.1, 3), rng.uniform(-0.05, 0.05), rng.uniform(0.9, 1.1))
    if "dof" in names and rng.uniform() < 0.5:
        image = depth_of_field(image, depth, int(rng.integers(12)), rng)
    if "shot_noise" in names and rng.uniform() < 0.5:
        photons = np.exp(rng.uniform(np.log(100), np.log(10000))) / 255
        image = np.clip(rng.poisson(image * photons) / photons, 0, 255).astype(np.uint8)
    if "blurring" in names and rng.uniform() < 0.5:
        ratio = rng.uniform(0.25, 1)
        small = cv2.resize(image, (int(w * ratio), int(h * ratio)), interpolation=cv2.INTER_AREA)
        image = cv2.resize(small, (w, h), interpolation=rng.choice([cv2.INTER_LINEAR_EXACT, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4]))
    if "jpeg_loss" in names and rng.uniform() < 0.5:
        code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(20, 100))])[1]
        image = cv2.imdecode(code, cv2.IMREAD_COLOR)
    return image


def jitter(image: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float, gamma: float) -> np.ndarray:
    """Brightness, contrast, saturation (factors), hue (turns) and gamma of an image (H, W, 3) uint8, in this order."""
    x = torch.from_numpy(image).permute(2, 0, 1)
    x = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(x, brightness), contrast), saturation)
    return TF.adjust_gamma(TF.adjust_hue(x, hue), gamma).permute(1, 2, 0).contiguous().numpy()


def depth_of_field(image: np.ndarray, depth: np.ndarray, max_radius: int, rng: np.random.Generator) -> np.ndarray:
    """Blur an image (H, W, 3) uint8 like a lens focused at a random disparity; discs of up to max_radius pixels."""
    radius = blur_radius(depth, max_radius, rng)
    if max_radius == 0:
        return image
    out = image.copy()
    for r in range(1, int(radius.max()) + 1):
        where = radius == r
        if where.any():
            x = np.arange(-r, r + 1)
            disc = (x * x + x[:, None] * x[:, None] <= r * r).astype(np.float32)
            blurred = cv2.filter2D(image, cv2.CV_32F, disc / disc.sum(), borderType=cv2.BORDER_REPLICATE)
            out[where] = np.clip(np.round(blurred[where]), 0, 255).astype(np.uint8)
    return out


def blur_radius(depth: np.ndarray, max_radius: int, rng: np.random.Generator) -> np.ndarray:
    """Radius (H, W) uint8 of the disc that each pixel is blurred with; a blurred foreground spreads over what lies behind it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        disparity = (1 / depth).astype(np.float32)
    unknown, finite = np.isnan(disparity), np.isfinite(depth)
    top = disparity[np.isfinite(disparity)].max(initial=0)
    lowest = disparity[finite].min(initial=top)  # the sky does not count
    focus = rng.uniform(lowest, top)
    if unknown.any() and not unknown.all():
        disparity = cv2.inpaint(np.where(unknown, 0, disparity), unknown.astype(np.uint8), 3, cv2.INPAINT_TELEA)
    disparity = np.clip(np.nan_to_num(disparity, posinf=top), 0, top) / max(top, 1e-12)
    focus = focus / max(top, 1e-12)

    def radius_of(d: np.ndarray) -> np.ndarray:
        return np.clip(np.abs(d - focus) * max_radius, 0, max_radius).astype(np.int32)

    radius = radius_of(disparity)
    for r in range(max_radius + 1):
        spread = cv2.dilate(disparity, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * r + 1, 2 * r + 1)))
        q = radius_of(spread)
        radius = np.where((q >= r) & (q >= radius) & (spread > disparity), q, radius)
    return np.round(cv2.blur(radius.astype(np.float32), (5, 5))).astype(np.uint8)
