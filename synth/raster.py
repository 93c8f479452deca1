"""Textured meshes: an OBJ reader and a small z-buffer rasteriser, all of it vectorised over triangles and pixels."""

from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from synth.scene import Camera

CANDIDATES = 1 << 21                                             # pixels tested at a time (memory)


@dataclass
class Mesh:
    """Triangles with z up. All corner arrays are per triangle corner, so that seams need no special care."""

    corners: np.ndarray                                          # (F, 3, 3) float64 places
    normals: np.ndarray                                          # (F, 3, 3) unit
    uv: np.ndarray                                               # (F, 3, 2), v = 0 at the bottom of the texture
    material: np.ndarray                                         # (F,) index into textures
    textures: list  # (h, w, 3) float32 RGB in [0, 1] each; 1x1 where the material is plain


def read_materials(path: Path) -> dict:
    """MTL file -> {name: (h, w, 3) float32 RGB}. A material without a picture is a 1x1 image of its diffuse colour."""
    out, name = {}, None
    for line in path.read_text(errors="replace").splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] == "newmtl":
            name = line.split(None, 1)[1].strip()
            out[name] = np.full((1, 1, 3), 0.7, np.float32)
        elif words[0] == "Kd" and out[name].size == 3:
            out[name] = np.array(words[1:4], np.float32).reshape(1, 1, 3)
        elif words[0] == "map_Kd":
            file = path.parent / line.split(None, 1)[1].strip()
            image = cv2.imread(str(file), cv2.IMREAD_COLOR)
            if image is None:
                raise ValueError(f"{path}: the picture {file} of material {name} is missing or unreadable")
            out[name] = image[..., ::-1].astype(np.float32) / 255
    return out


def read_obj(path) -> Mesh:
    """Read an OBJ file (v, vt, vn, f, usemtl, mtllib; polygons are split into fans; y up becomes z up).

    Raises OSError where it is missing, ValueError naming the file where it has no faces or refers to vertices that are not there.
    """
    path = Path(path)
    lists, faces, materials, current = {"v": [], "vt": [], "vn": []}, [], {}, ""
    for line in path.read_text(errors="replace").splitlines():
        key, _, rest = line.strip().partition(" ")
        if key in lists:
            lists[key].append([float(x) for x in rest.split()[:3]])
        elif key == "f":
            polygon = [(word.split("/") + ["", ""])[:3] for word in rest.split()]
            index = [[_index(word, len(lists[k])) for word, k in zip(corner, ("v", "vt", "vn"))] for corner in polygon]
            faces += [(index[0], index[i], index[i + 1], current) for i in range(1, len(index) - 1)]
        elif key == "usemtl":
            current = rest.strip()
        elif key == "mtllib":
            materials.update(read_materials(path.parent / rest.strip()))
    if not faces:
        raise ValueError(f"{path}: no faces in this OBJ file")
    names = sorted({f[3] for f in faces})
    textures = [materials.get(name, np.full((1, 1, 3), 0.7, np.float32)) for name in names]
    index = np.array([f[:3] for f in faces])                     # (F, 3 corners, v / vt / vn), -1 where not given
    padded = lambda kind, width: np.array([(x + [0.0] * width)[:width] for x in lists[kind] or [[]]])
    gather = lambda kind, slot, width: padded(kind, width)[index[..., slot]]
    try:
        corners, uv, normals = gather("v", 0, 3), gather("vt", 1, 2), gather("vn", 2, 3)
    except IndexError:
        raise ValueError(f"{path}: a face refers to a vertex that the file does not have") from None
    flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.where((index[..., 2:] < 0) | (np.abs(normals).sum(-1, keepdims=True) == 0), flat[:, None], normals)
    y_up = lambda x: np.stack([x[..., 0], -x[..., 2], x[..., 1]], -1)
    return Mesh(y_up(corners), y_up(_unit(normals)), uv, np.array([names.index(f[3]) for f in faces]), textures)


def _index(word: str, count: int) -> int:
    """OBJ index (from 1, negative: from the end so far) -> index from 0; -1 where absent."""
    return -1 if not word else int(word) - 1 if int(word) > 0 else count + int(word)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True).clip(1e-12)


def fit(mesh: Mesh) -> Mesh:
    """The mesh centred at the origin, its bounding box of diagonal 1."""
    flat = mesh.corners.reshape(-1, 3)
    low, high = flat.min(0), flat.max(0)
    return replace(mesh, corners=(mesh.corners - (low + high) / 2) / np.linalg.norm(high - low))


def rasterise(corners: np.ndarray, camera: Camera) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest triangle at each pixel centre: triangle (H, W) int32 (-1: none), barycentric weights (H, W, 3) on the surface,
    and z-depth (H, W) (inf: none).

    corners (F, 3, 3) world. Triangles that reach behind the camera are left out.
    """
    h, w = camera.height, camera.width
    xy, z = camera.project(corners.reshape(-1, 3))
    xy, z = xy.reshape(-1, 3, 2), z.reshape(-1, 3)
    low = np.ceil(xy.min(1) - 0.5).clip(0).astype(np.int64)  # first and last pixel centre in the bounding box
    high = np.floor(xy.max(1) - 0.5).clip(None, [w - 1, h - 1]).astype(np.int64)
    side = (high - low + 1).clip(0)
    side[(z <= 1e-6).any(1)] = 0
    count = side[:, 0] * side[:, 1]
    a, b, c = xy[:, 0], xy[:, 1], xy[:, 2]
    cross = lambda p, q: p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]
    area = cross(b - a, c - a)
    triangle, weights, depth = np.full(h * w, -1, np.int32), np.zeros((h * w, 3)), np.full(h * w, np.inf)
    todo = np.flatnonzero((count > 0) & (np.abs(area) > 1e-12))
    splits = np.searchsorted(np.cumsum(count[todo]), np.arange(CANDIDATES, count[todo].sum() + 1, CANDIDATES))
    for some in np.split(todo, splits):
        f = np.repeat(some, count[some])  # one row per (triangle, pixel of its box)
        k = np.arange(len(f)) - np.repeat(np.cumsum(count[some]) - count[some], count[some])
        column, row = low[f, 0] + k % side[f, 0], low[f, 1] + k // side[f, 0]
        p = np.stack([column, row], 1) + 0.5
        bary = np.stack([cross(b[f] - p, c[f] - p), cross(c[f] - p, a[f] - p), cross(a[f] - p, b[f] - p)], 1) / area[f, None]
        within = (bary >= 0).all(1)
        f, bary, pixel = f[within], bary[within], (row * w + column)[within]
        if not camera.orthographic:  # linear in the image -> linear on the surface
            bary = bary / z[f]
            bary /= bary.sum(1, keepdims=True)
        t = (bary * z[f]).sum(1)
        order = np.argsort(-t, kind="stable")  # the nearest is written last and stays
        order = order[t[order] < depth[pixel[order]]]
        pixel = pixel[order]
        triangle[pixel], weights[pixel], depth[pixel] = f[order], bary[order], t[order]
    return triangle.reshape(h, w), weights.reshape(h, w, 3), depth.reshape(h, w)


def sample(texture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Bilinear look-up (N, 3) in a texture (h, w, 3) that repeats; uv (N, 2), row = (1 - v) * h."""
    h, w = texture.shape[:2]
    x, y = uv[:, 0] * w - 0.5, (1 - uv[:, 1]) * h - 0.5
    i, j = np.floor(y).astype(int), np.floor(x).astype(int)
    s, t = (x - j)[:, None], (y - i)[:, None]
    i, j, i1, j1 = i % h, j % w, (i + 1) % h, (j + 1) % w
    return (1 - t) * ((1 - s) * texture[i, j] + s * texture[i, j1]) + t * ((1 - s) * texture[i1, j] + s * texture[i1, j1])


def _shrink(texture: np.ndarray, texels: float) -> np.ndarray:
    """The texture made smaller where a pixel covers many `texels` (along a side), against aliasing."""
    h, w = texture.shape[:2]
    if texels <= 1.3 or h * w == 1:
        return texture
    return cv2.resize(texture, (max(2, round(w / texels)), max(2, round(h / texels))), interpolation=cv2.INTER_AREA)


def render_mesh(mesh: Mesh, camera: Camera, sun: np.ndarray, ambient: float = 0.6, diffuse: float = 0.5) -> dict:
    """One frame of a lit, textured mesh: the entries of scene.render but `surfaces`; normals are interpolated and turned towards
    the camera. No antialiasing.
    """
    triangle, bary, depth = rasterise(mesh.corners, camera)
    hit = triangle >= 0
    f, weight = triangle[hit], bary[hit]
    blend = lambda corner: np.einsum("nc,ncd->nd", weight, corner[f])
    points, normal, uv = blend(mesh.corners), _unit(blend(mesh.normals)), blend(mesh.uv)
    facing = _unit(np.cross(mesh.corners[f, 1] - mesh.corners[f, 0], mesh.corners[f, 2] - mesh.corners[f, 0]))
    centre, forward = camera.cam_to_world[:3, 3], camera.cam_to_world[:3, 2]
    direction = np.broadcast_to(forward, points.shape) if camera.orthographic else points - centre
    back = np.einsum("nk,nk->n", facing, direction) > 0                                      # the inner side of an open mesh
    facing[back] *= -1
    normal = np.where((normal * facing).sum(1, keepdims=True) < 0, -normal, normal)
    colour = np.zeros((len(f), 3))
    xy = camera.project(mesh.corners.reshape(-1, 3))[0].reshape(-1, 3, 2)
    double_area = lambda x: np.abs(np.linalg.det(x[:, 1:] - x[:, :1]))                        # of plane triangles (F, 3, 2)
    for m, texture in enumerate(mesh.textures):
        rows = np.flatnonzero(mesh.material[f] == m)
        if len(rows):
            seen = np.unique(f[rows])
            texels = double_area(mesh.uv[seen]) * texture.shape[0] * texture.shape[1] / double_area(xy[seen]).clip(1e-9)
            colour[rows] = sample(_shrink(texture, float(np.sqrt(np.median(texels)))), uv[rows])
    light = ambient * (0.85 + 0.15 * normal[:, 2:]) + diffuse * np.clip(normal @ sun, 0, None)[:, None]
    full = lambda values, empty: _place(values, hit, empty)
    return {"rgb": full((np.clip(colour * light, 0, 1) * 255 + 0.5).astype(np.uint8), 0),
            "depth": depth.astype(np.float32), "points": full(points, np.nan), "normals": full(normal.astype(np.float32), 0),
            "normals_cam": full((normal @ camera.cam_to_world[:3, :3]).astype(np.float32), 0),
            "ids": hit.astype(np.int32), "K": camera.K, "cam_to_world": camera.cam_to_world}


def _place(values: np.ndarray, where: np.ndarray, empty) -> np.ndarray:
    """Array (H, W, C) with `values` (N, C) at the N true places of `where` and `empty` elsewhere."""
    out = np.full((*where.shape, values.shape[1]), empty, values.dtype)
    out[where] = values
    return out
