"""The fixed views, the camera and domain vector that conditions the UNet, and the rotation of normals between cameras.

Camera axes: x right, y up, z towards the viewer. POSES are world-to-camera [R|t] (3,4) of the rig that the published training
data was rendered with. The views stand 45 or 90 degrees apart in the plane of the rig, but the rig was tilted when the poses were
written down; so the elevations and azimuths computed from them look odd. They serve as labels of the views, and the
published weights were trained with them: keep them.
"""

import numpy as np
import torch
from torch import Tensor

POSES = {
    "front": [
        [0.52665836, -0.7410295, 0.41654074, 0.0],
        [5.865639e-08, 0.49000356, 0.87172043, 9.4623516e-08],
        [-0.85007703, -0.45909882, 0.25806454, -1.3000001],
    ],
    "front_right": [
        [0.97349894, -0.19935519, 0.1120597, -1.4156103e-07],
        [3.7902246e-09, 0.4900035, 0.8717205, -1.7722036e-07],
        [-0.22869164, -0.8486189, 0.47701788, -1.8384776],
    ],
    "right": [
        [0.85007703, 0.4590989, -0.25806445, 5.9604645e-08],
        [-4.257411e-08, 0.4900035, 0.8717205, -9.0060674e-08],
        [0.52665836, -0.74102956, 0.41654074, -1.3000001],
    ],
    "back_right": [
        [0.22869147, 0.84861904, -0.47701782, 1.5646219e-07],
        [-3.4179145e-08, 0.4900034, 0.87172055, -7.2938114e-08],
        [0.973499, -0.19935507, 0.112059616, -1.838478],
    ],
    "back": [
        [-0.5266583, 0.7410295, -0.41654074, -5.9604645e-08],
        [5.865639e-08, 0.49000356, 0.87172043, -9.4623516e-08],
        [0.85007703, 0.45909882, -0.25806448, -1.3000001],
    ],
    "back_left": [
        [-0.9734989, 0.19935519, -0.1120597, -1.7136335e-07],
        [3.7902246e-09, 0.4900035, 0.8717205, 1.7722036e-07],
        [0.22869164, 0.8486189, -0.47701785, -1.8384776],
    ],
    "left": [
        [-0.85007715, -0.4590989, 0.25806445, 0.0],
        [-4.257411e-08, 0.4900035, 0.8717205, 9.0060674e-08],
        [-0.52665836, 0.74102956, -0.41654083, -1.3000001],
    ],
    "front_left": [
        [-0.2286917, -0.848619, 0.4770179, -2.4586916e-07],
        [9.085838e-09, 0.49000347, 0.87172055, 1.2056957e-07],
        [-0.973499, 0.19935517, -0.112059765, -1.838478],
    ],
    "top": [
        [0.9958608, 0.07923202, -0.044537157, -3.098167e-09],
        [-0.09089154, 0.8681122, -0.48797533, 5.7847384e-08],
        [-2.0281242e-08, 0.49000356, 0.87172043, -1.3000001],
    ],
}
VIEWS = ("front", "front_right", "right", "back", "left", "front_left")

# What the published sampler uses when it is given no cameras: the angles of the six views rounded to fp16
SAMPLER_D_ELEVATION = (0.0, -0.2362, -0.1686, 0.5220, 0.6904, 0.3733)
SAMPLER_D_AZIMUTH = (0.0, 0.8125, 1.6934, 3.1406, 4.8359, 5.5859)


def view_names(num_views: int) -> tuple[str, ...]:
    """The views of a model with 1 to 6 views: all six; or front, right, back, left; or these with front_right."""
    chosen = {4: ("front", "right", "back", "left"), 5: ("front", "front_right", "right", "back", "left")}
    if not 1 <= num_views <= len(VIEWS):
        raise ValueError(f"num_views {num_views}: there are 1 to {len(VIEWS)} fixed views")
    return chosen.get(num_views, VIEWS[:num_views])


def rotation(view: str) -> np.ndarray:
    """World-to-camera rotation of a view, (3,3) float64."""
    return np.array(POSES[view], np.float64)[:, :3]


def spherical(view: str) -> tuple[float, float]:
    """(theta, phi) of the camera's centre in radians: theta from +z (larger is lower), phi around z."""
    x, y, z = -rotation(view).T @ np.array(POSES[view], np.float64)[:, 3]
    return float(np.arctan2(np.hypot(x, y), z)), float(np.arctan2(y, x))


def camera_angles(condition_view: str, views: tuple[str, ...] = VIEWS) -> np.ndarray:
    """(V,3) float32, radians: (0, elevation, azimuth in [0, 2 pi)) of every view relative to the view of the input picture."""
    theta0, phi0 = spherical(condition_view)
    relative = [(0.0, theta - theta0, (phi - phi0) % (2 * np.pi)) for theta, phi in map(spherical, views)]
    return np.array(relative, np.float32)


def sampler_angles(num_views: int) -> np.ndarray:
    """(V,3) float32: the first V rows of the table that the published sampler uses by default."""
    table = np.stack([np.zeros(6), SAMPLER_D_ELEVATION, SAMPLER_D_AZIMUTH], axis=1)
    return table[:num_views].astype(np.float16).astype(np.float32)


def camera_vector(angles: Tensor, is_normal: Tensor | None) -> Tensor:
    """The UNet's input: sines, then cosines of (0, elevation, azimuth, is normal, is colour).

    angles (...,3) radians, is_normal (...) bool or 0/1 -> (...,10) fp32, or (...,6) without the flags where None. Computed in
    fp32 whatever the precision of training.
    """
    raw = angles.float()
    if is_normal is not None:
        flag = is_normal.to(angles.device, torch.float32)
        raw = torch.cat([raw, torch.stack([flag, 1 - flag], dim=-1)], dim=-1)
    return torch.cat([raw.sin(), raw.cos()], dim=-1)


def normal_rotation(condition_view: str, views: tuple[str, ...] = VIEWS) -> np.ndarray:
    """(V,3,3) float32: turns normals in each view's camera axes into the axes of the camera of the input picture."""
    to_condition = rotation(condition_view)
    return np.stack([to_condition @ rotation(view).T for view in views]).astype(np.float32)
