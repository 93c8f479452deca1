"""LBM, an online tracker of arbitrary pixels.

Zheng et al., Lattice Boltzmann Model for Learning Real-World Pixel Dynamicity, 2025. A ResNet-18 at stride 4 encodes each
frame. Every tracked point carries a token, sampled once where the point was queried, and two memories of the last M frames:
*collision* (features at the predicted places) and *stream* (the transformed tokens). Per frame, each transformer layer reads
both memories, correlates the token with the frame, and refines it at the best cells; heads then give a sub-cell offset,
visibility and uncertainty. Points never interact.

B batch, T frames, N points. Positions are pixel-edge coordinates (x, y); queries are (t, x, y).
"""

import argparse
import copy
import math
import pickle

import torch
import torch.nn.functional as F
from torch import nn

from lbm import loss
from lbm.backbone import DIM, LEVELS, STRIDE, Backbone, compute_dtype, pool_pyramid, sample_tokens
from lbm.deform_attn import resolve_msda
from lbm.transformer import Layer, Transformer

LOSS_NAMES = ("classification_loss", "visibility_loss", "regression_loss", "uncertainty_loss", "uncertainty_loss_topk")


def rescale(points: torch.Tensor, source, target) -> torch.Tensor:
    """Points (..., 2) in pixels of an image of size `source` (h, w) -> float32 in pixels of size `target`."""
    x, y = points.float().unbind(-1)
    return torch.stack((x * (target[1] / source[1]), y * (target[0] / source[0])), -1)


class LBM(nn.Module):
    """The tracker. Arguments are the paper's; `stride`, `embed_dim`, `num_levels` are listed because configurations name them.

    input_size: (H, W) every frame is resized to; with multiples of 32 every level of the pyramid covers the whole frame.
    msda: kernel of the deformable attentions, auto | torch | triton | mmcv. checkpointing: recompute the backbone's stages, the
    layers and the heads in the backward pass. Both may be changed at any time, as may visibility_threshold and
    random_memory_mask_drop.
    """

    def __init__(
        self,
        *,
        input_size=(384, 512),
        stride: int = STRIDE,
        num_layers: int = 3,
        embed_dim: int = DIM,
        num_heads: int = 4,
        num_levels: int = LEVELS,
        num_neighbors: int = 9,
        top_k_regions: int = 9,
        dropout: float = 0.1,
        memory_size: int = 12,
        random_memory_mask_drop: float = 0.1,
        visibility_threshold: float = 0.8,
        lambda_cls: float = 3.0,
        lambda_vis: float = 1.0,
        lambda_reg: float = 1.0,
        lambda_unc: float = 1.0,
        lambda_ref: float = 1.0,
        loss_after_query: bool = True,
        msda: str = "auto",
        checkpointing: bool = False,
    ):
        super().__init__()
        if (stride, embed_dim, num_levels) != (STRIDE, DIM, LEVELS):
            raise ValueError(f"stride {STRIDE}, embed_dim {DIM} and num_levels {LEVELS} are fixed by the backbone")
        if any(n % STRIDE or n < 32 for n in input_size):
            raise ValueError(f"input_size {tuple(input_size)}: height and width must be multiples of {STRIDE} and at least 32")
        cells = input_size[0] * input_size[1] // STRIDE**2
        for name, value, low, high in (
            ("num_layers", num_layers, 2, math.inf),
            ("num_heads", num_heads, 1, DIM),
            ("num_neighbors", num_neighbors, 1, math.inf),
            ("top_k_regions", top_k_regions, 1, cells),
            ("memory_size", memory_size, 1, math.inf),
            ("dropout", dropout, 0, 0.99),
            ("random_memory_mask_drop", random_memory_mask_drop, 0, 1),
            ("visibility_threshold", visibility_threshold, 0, 1),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must lie in {low} .. {high}")
        self.input_size, self.memory_size = tuple(input_size), memory_size
        self.visibility_threshold, self.random_memory_mask_drop = visibility_threshold, random_memory_mask_drop
        self.lambdas = (lambda_cls, lambda_vis, lambda_reg, lambda_unc, lambda_ref)
        self.loss_after_query = loss_after_query
        self.msda, self.checkpointing = msda, checkpointing
        self.static_memory = False  # see `_slots`
        self.backbone = Backbone(input_size)
        self.transformer = Transformer(input_size, num_layers, num_heads, num_neighbors, top_k_regions, dropout, memory_size)

    # ---- pieces of a forward pass

    def msda_name(self, device=None) -> str:
        """What `msda` stands for on a device (by default the model's)."""
        return resolve_msda(self.msda, device or self.transformer.spatial_shapes.device)

    def encode(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """frames (F, 3, h0, w0), 0..255 -> f (F, h, w, C) float32 and the pyramid (F, S, C) in the compute dtype."""
        f = self.backbone(frames, self.checkpointing)
        return f, pool_pyramid(f).to(compute_dtype(f.device))

    def _slots(self, memory: list[dict]) -> list[dict]:
        """The last M entries. A compiled model gets M at every frame, ignored zeros first, so that shapes never change."""
        memory = memory[-self.memory_size :]
        if not (self.static_memory and memory):
            return memory
        # Each a tensor of its own that requires a gradient where the entries do: the compiler would tell such frames apart.
        zeros = lambda x: torch.zeros_like(x, requires_grad=x.requires_grad)
        empty = lambda: {name: [zeros(x) for x in memory[0][name]] for name in ("collision", "stream")}
        ignore = {"ignore": torch.ones_like(memory[0]["ignore"])}
        return [empty() | ignore for _ in range(self.memory_size - len(memory))] + memory

    def compile_step(self, **options):
        """torch.compile the per-frame layers and heads, in place, with its options; names in the state dict stay."""
        self.static_memory = True
        self.transformer.run_layer = torch.compile(Layer.forward, **options)
        self.transformer.run_heads = torch.compile(Transformer.heads, **options)

    # ---- training

    def forward(self, video, queries, tracks, visible, valid=None) -> dict[str, torch.Tensor]:
        """Track a clip and compare with the truth.

        video (B, T, 3, h0, w0) uint8 or float, RGB 0..255, of any size; queries (B, N, 3) (t, x, y) and tracks (B, T, N, 2)
        (x, y) in pixels of the video; visible (B, T, N) bool; valid (B, N) bool, False for padding, or None.

        Returns the five terms of LOSS_NAMES with their weights and their sum "loss" (0-dim, float32, with graph); without graph
        "points" (B, T, N, 2) in pixels of the video, "visibility" (B, T, N) bool, "uncertainty" (B, T, N): probability that the
        point is hidden or more than 8 px off. (A forward hook on `transformer` sees everything else, frame by frame.)
        """
        b, t = video.shape[:2]
        size = video.shape[-2:]
        queries = torch.cat((queries[..., :1].float(), rescale(queries[..., 1:], size, self.input_size)), -1)
        tracks = rescale(tracks, size, self.input_size)
        target = loss.cell_index(tracks, self.input_size, STRIDE)  # (B, T, N)

        f, pyramid = self.encode(video.transpose(0, 1).flatten(0, 1))  # frames lie together: (T * B, ...)
        token = sample_tokens(f.unflatten(0, (t, b)), queries, self.input_size)
        del f  # 1.1 GiB in the published setting
        feats = pyramid.unflatten(0, (t, b)).unbind()
        weights = [layer.attention_weights() for layer in self.transformer.layers]
        lattice = self.transformer.lattice(self.msda)
        memory, frames = [], []
        for i in range(t):
            queried = queries[..., 0] <= i
            out = self.transformer(
                token, feats[i], queried, self._slots(memory), weights, lattice, target=target[:, i],
                mask_drop=self.random_memory_mask_drop if self.training else 0.0, checkpointing=self.checkpointing,
            )  # fmt: skip
            memory.append(self.transformer.remember(out, self._ignore(out, queried), weights))
            del out["corr"]  # the largest tensor by far; its best cells and two numbers per point have been taken
            frames.append(out)
        return self._losses(frames, queries, tracks, visible, valid, size)

    def _losses(self, frames, queries, tracks, visible, valid, video_size):
        """The five terms and the report from the frames' outputs; queries and tracks in pixels of input_size."""
        stack = lambda name: torch.stack([out[name] for out in frames], 1)  # (B, T, N, ...)
        layers = lambda name: [torch.stack(x, 1) for x in zip(*(out[name] for out in frames))]  # per layer (B, T, N, ...)
        offset, vis, rho = stack("offset"), stack("vis"), stack("rho")
        *candidates, cell = layers("candidates")
        candidates, cell = torch.cat(candidates, 3), cell.squeeze(3)  # of the earlier layers (B, T, N, 13, 2), of the last
        candidate_rho = torch.cat(layers("candidate_rho")[:-1], 3)
        position = cell + offset
        scored, both = loss.loss_masks(queries[..., 0], visible, valid, self.loss_after_query)

        per_layer = [loss.classification_loss(a, b, both) for a, b in zip(layers("log_sum"), layers("logit"))]
        truth = (tracks, visible, scored)
        terms = (
            torch.stack(per_layer).mean(),
            loss.visibility_loss(vis, visible, scored),
            loss.regression_loss(offset, cell, tracks, both, STRIDE),
            loss.uncertainty_loss(rho, position, *truth),
            loss.uncertainty_loss(candidate_rho, candidates, *(x.unsqueeze(3) for x in truth)),
        )
        terms = {name: weight * term for name, weight, term in zip(LOSS_NAMES, self.lambdas, terms)}
        return terms | {"loss": sum(terms.values())} | self._report(position, vis, rho, video_size)

    def _report(self, position, vis, rho, video_size) -> dict[str, torch.Tensor]:
        """What a caller sees, without graph: positions in pixels of the video."""
        return {
            "points": rescale(position.detach(), self.input_size, video_size),
            "visibility": vis.detach().sigmoid() > self.visibility_threshold,
            "uncertainty": rho.detach().sigmoid(),
        }

    def _ignore(self, out: dict, queried: torch.Tensor) -> torch.Tensor:
        """(B, N) bool: a frame's memory entry is not to be read again."""
        return ~queried | (out["vis"].detach().sigmoid() < self.visibility_threshold)

    # ---- inference

    @torch.no_grad()
    def inference(
        self, video, queries, spatial_penalty: float | None = None, chunk: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Track through a video of any length frame by frame, without looking ahead. Put the model in eval mode first.

        Arguments and result as in `forward`. A point's token is taken when its query frame comes; what is returned for earlier
        frames means nothing. chunk: at most so many points at a time (memory; the numbers are the same).
        spatial_penalty: a distance in cells over which correlations decay from the last position (off: None).
        ValueError for a query whose time is no frame of the video, or that is not finite.
        """
        size = video.shape[-2:]
        time, last = queries[..., 0], video.shape[1] - 1
        if not (queries.isfinite().all() and ((time == time.round()) & (time >= 0) & (time <= last)).all()):
            raise ValueError(f"queries (t, x, y) must be finite numbers with t a whole frame of the video, 0 to {last}")
        queries = torch.cat((queries[..., :1].float(), rescale(queries[..., 1:], size, self.input_size)), -1)
        groups = queries.split(chunk or max(queries.shape[1], 1), 1)
        tracks = [Track(self, q[..., 1:], spatial_penalty) for q in groups]
        frames = []
        for i in range(video.shape[1]):
            f, feat = self.encode(video[:, i])
            outs = []
            for track, q in zip(tracks, groups):
                here = torch.cat((torch.zeros_like(q[..., :1]), q[..., 1:]), -1)
                token = sample_tokens(f[None], here, self.input_size)
                track.token = torch.where((q[..., 0] == i)[..., None], token, track.token)
                outs.append(track.step(feat, q[..., 0] <= i))
            frames.append([torch.cat(x, 1) for x in zip(*outs)])
        return self._report(*(torch.stack(x, 1) for x in zip(*frames)), size)

    def with_memory_size(self, memory_size: int) -> "LBM":
        """A frozen copy in eval mode, not compiled, whose memories hold `memory_size` frames; this model stays as it is."""
        model = copy.deepcopy(self).eval().requires_grad_(False)
        model.static_memory = False
        model.transformer.run_layer, model.transformer.run_heads = Layer.forward, Transformer.heads
        for layer in model.transformer.layers:
            for name in ("collision_time_emb", "stream_time_emb"):
                setattr(layer, name, nn.Parameter(resize_time_embedding(getattr(layer, name), memory_size), requires_grad=False))
        model.memory_size = memory_size
        return model


def resize_time_embedding(emb: torch.Tensor, memory_size: int) -> torch.Tensor:
    """(1, M + 1, C) -> (1, memory_size + 1, C): the slots' rows interpolated over time, the last row (now) kept."""
    slots = F.interpolate(emb[:, :-1].mT.float(), size=memory_size, mode="linear", align_corners=True).mT
    return torch.cat((slots.to(emb.dtype), emb[:, -1:]), 1)


class Track:
    """State of a set of points between frames (no gradient): tokens, memory, last positions."""

    def __init__(self, model: LBM, last: torch.Tensor, spatial_penalty: float | None = None):
        """last (B, N, 2): where the points were queried, px of input_size."""
        self.model, self.last, self.spatial_penalty = model, last, spatial_penalty
        self.token = last.new_zeros(*last.shape[:2], DIM)
        self.memory = []
        self.weights = [layer.attention_weights() for layer in model.transformer.layers]
        self.lattice = model.transformer.lattice(model.msda)

    def step(self, feat, queried) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One frame's pyramid (B, S, C), queried (B, N) bool -> positions (B, N, 2) px of input_size, vis, rho. N may be 0."""
        if not self.token.shape[1]:
            none = self.last.new_zeros(self.last.shape[:2])
            return self.last, none, none
        model = self.model
        out = model.transformer(
            self.token, feat, queried, model._slots(self.memory), self.weights, self.lattice, prior=self._prior()
        )
        entry = model.transformer.remember(out, model._ignore(out, queried), self.weights)
        self.memory = [*self.memory, entry][-model.memory_size :]
        position = out["candidates"][-1].squeeze(2) + out["offset"]
        self.last = torch.where(queried[..., None], position, self.last)
        return position, out["vis"], out["rho"]

    def _prior(self):
        """exp(-d / threshold), d the distance in cells from the last position: (B, N, P), or None."""
        if self.spatial_penalty is None:
            return None
        h, w = self.model.transformer.shapes[0]
        centers = loss.cell_center(torch.arange(h * w, device=self.last.device), self.model.input_size, STRIDE)
        return torch.exp(-torch.cdist(self.last, centers.expand(len(self.last), -1, -1)) / (STRIDE * self.spatial_penalty))


class Online:
    """Streaming: one frame at a time, points may come and go. All points count as queried.

        tracker = Online(model.eval())
        tracker.init(points, first_frame)
        for frame in frames: points, visible, uncertainty = tracker.step(frame)

    Frames are (3, h0, w0), uint8 or float, RGB 0..255; points (N, 2) (x, y) in their pixels. `frame_feat` holds the features of
    the frame last seen.
    """

    def __init__(self, model: LBM, spatial_penalty: float | None = None):
        self.model, self.spatial_penalty = model, spatial_penalty

    @torch.no_grad()
    def init(self, points: torch.Tensor, first_frame: torch.Tensor):
        """Take the tokens of the points from the frame; the memory stays empty, as this frame is not tracked through."""
        self.frame_feat = self.model.encode(first_frame[None])[0]
        self.size = first_frame.shape[-2:]
        self.track = Track(self.model, rescale(points[None], self.size, self.model.input_size), self.spatial_penalty)
        self.track.token = self._tokens(self.track.last, self.frame_feat)

    def _tokens(self, points, frame_feat):
        queries = torch.cat((torch.zeros_like(points[..., :1]), points), -1)
        return sample_tokens(frame_feat[None], queries, self.model.input_size)

    @torch.no_grad()
    def step(self, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Next frame -> points (N, 2) px of the frame, visible (N,) bool, uncertainty (N,) in [0, 1]."""
        self.frame_feat, feat = self.model.encode(frame[None])
        self.size = frame.shape[-2:]
        queried = torch.ones(self.track.token.shape[:2], dtype=torch.bool, device=frame.device)
        result = self.model._report(*self.track.step(feat, queried), self.size)
        return result["points"][0], result["visibility"][0], result["uncertainty"][0]

    @torch.no_grad()
    def update(self, points: torch.Tensor, frame_feat: torch.Tensor, update_mask: torch.Tensor, remove_mask: torch.Tensor):
        """Refresh, drop and add points.

        update_mask, remove_mask (N,) bool over the present points (remove wins). points: first one row per refreshed point, in
        their order, then the new ones, in pixels of the frame whose features `frame_feat` are. A refreshed point starts anew at
        its place with an empty memory. Kept and refreshed points keep their order, new ones follow.
        """
        track = self.track
        stay = ~remove_mask
        refreshed = update_mask[stay].nonzero().squeeze(1)
        points = rescale(points[None], self.size, self.model.input_size)
        if points.shape[1] < len(refreshed):
            raise ValueError(f"{points.shape[1]} points given, {len(refreshed)} are to be refreshed")
        token = self._tokens(points, frame_feat)
        n = len(refreshed)
        new = points.shape[1] - n

        def merge(old, given):
            old = old[:, stay]
            old[:, refreshed] = given[:, :n].to(old.dtype)
            return torch.cat((old, given[:, n:].to(old.dtype)), 1)

        blank = lambda x, value: x.new_full((len(x), n + new, *x.shape[2:]), value)
        track.token, track.last = merge(track.token, token), merge(track.last, points)
        track.memory = [
            {"ignore": merge(entry["ignore"], blank(entry["ignore"], True))}
            | {name: [merge(x, blank(x, 0)) for x in entry[name]] for name in ("collision", "stream")}
            for entry in track.memory
        ]


# ------------------------------------------------------------------------------------------------ checkpoints


def _read(path) -> dict:
    """A torch file of tensors and plain values, nothing else; official training files also hold an argparse.Namespace."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: damaged, or holds more than tensors and plain values, which is not loaded ({error})"
        ) from error
    except Exception as error:  # truncated archives raise RuntimeError, EOFError, KeyError, ... depending on where they end
        raise ValueError(f"{path}: not a readable checkpoint, probably cut short; copy or download it again ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def _match(module: nn.Module, state: dict, path) -> None:
    """load_state_dict with every wrong name and shape in the message."""
    own = module.state_dict()
    wrong = [f"missing {k}" for k in own.keys() - state.keys()] + [f"unexpected {k}" for k in state.keys() - own.keys()]
    both = own.keys() & state.keys()
    wrong += [f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in both if state[k].shape != own[k].shape]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{path}: does not fit the model: {'; '.join(sorted(wrong)[:8])}{more}")
    module.load_state_dict(state)


def read_checkpoint(path) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights by name without 'module.', and all that the file holds beside them.

    Reads released {'model': ...}, official training files (optimizer, epoch, a Namespace in 'args'), and a bare state dict.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
    """
    content = _read(path)
    state = content.get("model", content)
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds no weights: expected a state dict, or one under 'model'")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state), content if "model" in content else {}


def load_checkpoint(model: LBM, path) -> dict:
    """Load the weights of any file that `read_checkpoint` reads. Names must match exactly; time embeddings of another memory size
    are interpolated, and so are their moments in the optimizer's state.

    Returns {"notes": lines for the log, "optimizer", "scaler": their states or None, "epoch": int or None}.
    Errors as in `read_checkpoint`, and ValueError for weights that do not fit.
    """
    (state, rest), notes = read_checkpoint(path), []
    moments = (rest.get("optimizer") or {"state": {}})["state"]  # by the number of the parameter
    numbers = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    place = state.get("backbone.frame_pos_embedding")
    if place is not None and place.shape != model.backbone.frame_pos_embedding.shape:
        h, w = place.shape[-2] * STRIDE, place.shape[-1] * STRIDE
        raise ValueError(f"{path}: its position embedding is for input_size [{h}, {w}], the model has {list(model.input_size)}")
    for name, value in state.items():
        if name.endswith("time_emb") and value.dim() == 3 and value.shape[1] != model.memory_size + 1:
            state[name] = resize_time_embedding(value, model.memory_size)
            for kind, moment in moments.get(numbers.get(name), {}).items():
                if kind.startswith("exp_avg"):
                    moments[numbers[name]][kind] = resize_time_embedding(moment, model.memory_size)
            notes.append(f"{path}: {name} interpolated from {value.shape[1] - 1} to {model.memory_size} memory slots")
    _match(model, state, path)
    return {"notes": notes, **{key: rest.get(key) for key in ("optimizer", "scaler", "epoch")}}


def load_resnet18(model: LBM, path) -> list[str]:
    """ImageNet weights of torchvision's ResNet-18 into the backbone's three stages; its layer4 and fc are ignored.

    Returns lines for the log. Errors as in `load_checkpoint`.
    """
    stem = {"conv1": "layer1.0", "bn1": "layer1.1", "layer1": "layer1.4", "layer2": "layer2", "layer3": "layer3"}
    state = {}
    for name, value in _read(path).items():
        head, _, rest = name.partition(".")
        if head in stem and isinstance(value, torch.Tensor):
            state[f"{stem[head]}.{rest}"] = value
    stages = nn.ModuleDict({name: getattr(model.backbone, name) for name in ("layer1", "layer2", "layer3")})
    _match(stages, state, path)
    return [f"backbone: {len(state)} tensors of ResNet-18 from {path}"]


def point_grid(g: int, height: int, width: int) -> torch.Tensor:
    """g x g points (1, g * g, 2) (x, y) px, x fastest, with a margin of width / 64 on all sides."""
    margin = width / 64
    x, y = torch.linspace(margin, width - margin, g), torch.linspace(margin, height - margin, g)
    return torch.stack((x.repeat(g), y.repeat_interleave(g)), -1)[None]
