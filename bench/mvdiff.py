"""Measurements of mvdiff/: training step with and without cached frozen work, the encoders alone, memory, loader. See bench.py.

Ratios are taken against the published form of the same networks, re-created here (`published_form`): twelve encodings of the
condition picture per object, keys and values repeated per view, norms, activations and cross-attention to the image token
as plain modules, AdamW parameter by parameter. Fused attention ("4-D") is the kind reading of it: on a CPU the published code has
to run with 3-D tensors in place of its GPU kernel, which materialises the scores.
"""

import contextlib
import multiprocessing
import re
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from mvdiff import layers, loss, model, optim, unet, vae
from mvdiff.camera import VIEWS as VIEW_NAMES
from mvdiff.clip import CLIPVision
from mvdiff.dataset import MultiViewDataset, compose
from mvdiff.diffusion import Diffusion

VIEWS, ROWS = 6, 12
TEST_NET = {  # 36.4 M parameters, with encoders whose share of the published step is about that of the real ones
    "unet": {"block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 128, "attention_head_dim": 4},
    "vae": {"block_out_channels": (32, 64, 128, 128)},
    "clip": {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "projection_dim": 128,
    },
}
TINY_NET = {
    "unet": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 4},
    "vae": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    "clip": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "projection_dim": 32},
}
FULL_NET = {"unet": {}, "vae": {}, "clip": {}}


# ---- the published form ----------------------------------------------------------------------------------------------


def published_group_norm(x, norm):
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def published_norm_conv2d(x, norm, conv):
    return conv(F.silu(published_group_norm(x, norm)))


def published_multiview(self, x, views, norm=None):
    n, t, c = x.shape
    repeat = lambda y: y.view(n // views, 1, views * t, c).expand(-1, views, -1, -1).reshape(n, views * t, c)
    return self.attend(self.to_q(x), repeat(self.to_k(x)), repeat(self.to_v(x)))


def published_cross_domain(self, x, norm=None):
    both = lambda y: torch.cat(y.chunk(2), dim=1).repeat(2, 1, 1)
    return self.attend(self.to_q(x), both(self.to_k(x)), both(self.to_v(x)))


def published_attend_3d(self, q, k, v):
    q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return self.to_out(out.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2))


def published_block(self, x, context):
    x = x + self.self_attention(self.norm1(x))
    if self.cd_mid:
        x = x + self.attn_joint_mid.cross_domain(self.norm_joint_mid(x))
    x = x + self.attn2(self.norm2(x), context)
    return x + self.ff(self.norm3(x))


def published_geglu_linear(x, linear):
    value, gate = x.chunk(2, dim=-1)
    return linear(value * F.gelu(gate))


@contextlib.contextmanager
def published_form(attention: str = "4-D"):
    """Within it the networks of mvdiff run as the published code does."""
    with contextlib.ExitStack() as stack:
        for module in (layers, unet, vae):
            stack.enter_context(mock.patch.object(module, "group_norm", published_group_norm))
            stack.enter_context(mock.patch.object(module, "conv2d", lambda x, conv: conv(x)))
            stack.enter_context(mock.patch.object(module, "norm_conv2d", published_norm_conv2d))
        stack.enter_context(mock.patch.object(unet, "geglu_linear", published_geglu_linear))
        stack.enter_context(mock.patch.object(unet.TransformerBlock, "forward", published_block))
        stack.enter_context(mock.patch.object(unet.Attention, "multiview", published_multiview))
        stack.enter_context(mock.patch.object(unet.Attention, "cross_domain", published_cross_domain))
        if attention == "3-D":
            stack.enter_context(mock.patch.object(unet.Attention, "attend", published_attend_3d))
        yield


# ---- training step ---------------------------------------------------------------------------------------------------


class Trainer:
    """Networks with random weights and one batch of `objects` random objects of side `size`; `step()` is one training step."""

    def __init__(self, net: dict, size: int, objects: int, form: str, device="cpu", stage: int = 1, **options):
        torch.manual_seed(0)
        self.published, self.cache, self.cached = form == "published", None, form == "cached"
        self.device, self.objects, self.amp, self.chunk = device, objects, options.get("amp"), options.get("chunk", 0)
        with torch.device(device):
            self.unet = unet.UNet(**net["unet"]).train()
            self.vae = vae.AutoencoderKL(**net["vae"]).requires_grad_(False).eval()
            self.clip = CLIPVision(**net["clip"]).requires_grad_(False).eval()
        if self.amp:
            self.vae, self.clip = self.vae.to(self.amp), self.clip.to(self.amp)
        self.unet.set_checkpointing(options.get("checkpointing", False))
        suffixes = ["joint_mid"] if stage == 2 else None
        trained = optim.select_trainable(self.unet, suffixes, freeze_unused=not self.published)
        self.trained = list(trained.values())
        groups = optim.parameter_groups(trained, 1e-4, 10)
        self.optimizer = torch.optim.AdamW(groups, fused=True) if not self.published else torch.optim.AdamW(groups)
        self.shadows = [p.detach().clone() for p in self.trained]
        self.network = torch.compile(self.unet) if options.get("compile") else self.unet
        self.diffusion = Diffusion().to(device)
        rand = lambda *shape: torch.rand(*shape, device=device)
        self.condition, self.targets = rand(objects, 3, size, size) * 2 - 1, rand(objects * ROWS, 3, size, size) * 2 - 1
        self.pixels, self.camera = rand(objects, 3, 224, 224), rand(objects * ROWS, 10)
        self.times = {}

    def clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    @torch.no_grad()
    def encode(self):
        """(mean and deviation of all rows, condition latent, embedding). The published form encodes the condition per row."""
        if self.published:
            repeat = lambda x: x.repeat_interleave(ROWS, dim=0)
            latent, embedding = model.encode_condition(self.vae, self.clip, repeat(self.condition), repeat(self.pixels))
            return *self.vae.encode(self.targets), latent[::ROWS], embedding[::ROWS]
        if self.cache is None or not self.cached:
            condition = model.encode_condition(self.vae, self.clip, self.condition, self.pixels)
            self.cache = *self.vae.encode(self.targets, self.chunk), *condition
        return self.cache

    def step(self) -> None:
        start = self.clock()
        mean, std, latent, embedding = self.encode()
        latents = (mean + std * torch.randn_like(std)) * self.vae.scaling_factor
        self.times["encoders"] = (encoded := self.clock()) - start
        noise = torch.randn_like(latents)
        t = loss.draw_timesteps(1000, "group", [torch.default_generator] * self.objects, 2, VIEWS).to(self.device)
        with torch.autocast(self.device, self.amp, enabled=self.amp is not None):
            x = self.diffusion.add_noise(latents, noise, t)
            prediction = model.predict(self.network, x, t, latent, embedding, self.camera, VIEWS)
        loss.denoising_loss(prediction, latents, noise, t, self.diffusion, snr_gamma=5.0)[0].backward()
        self.times["forward_backward"] = (learnt := self.clock()) - encoded
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.published:
            with torch.no_grad():
                for shadow, parameter in zip(self.shadows, self.trained):
                    shadow.sub_(1e-4 * (shadow - parameter))
        else:
            optim.ema_update(self.shadows, [p.detach() for p in self.trained], 0.9999)
        self.times["optimizer"] = self.clock() - learnt
        self.times["step"] = self.clock() - start


FORMS = {  # row -> (form, attention of the published form)
    "published form, 3-D attention": ("published", "3-D"),
    "published form, 4-D attention": ("published", "4-D"),
    "ours, encoders in the step": ("encoded", None),
    "ours, frozen work cached": ("cached", None),
}


def run_step(trainer: Trainer, attention: str | None = None) -> dict[str, float]:
    """One step, in the published form if `attention` is given; its times."""
    with published_form(attention) if attention else contextlib.nullcontext():
        trainer.step()
    return dict(trainer.times)


def best(runs: list[dict[str, float]]) -> dict[str, float]:
    """The least time of each part of a step."""
    return {f"{part}_s": min(run[part] for run in runs) for part in runs[0]}


def _peak(queue, form: str, attention: str | None, args: tuple, options: dict) -> None:
    torch.set_num_threads(1)
    trainer = Trainer(*args, form, **options)
    for _ in range(2):
        run_step(trainer, attention)
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent process too
    queue.put(int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1e6)


def peak_gb(*args) -> float:
    """Peak memory of a process that does nothing but two training steps."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(queue, *args))
    process.start()
    out = queue.get()
    process.join()
    return out


def compare_steps(net: dict, size: int, count: int, stage: int, chunk: int = 2):
    """Yield (row, figures) of every form of the step, one object, fp32, CPU time. The forms take turns, so that whatever else the
    machine does slows all alike."""
    trainers = {row: Trainer(net, size, 1, form, stage=stage, chunk=chunk) for row, (form, _) in FORMS.items()}
    runs = {row: [] for row in FORMS}
    for _ in range(count + 1):
        for row, trainer in trainers.items():
            runs[row].append(run_step(trainer, FORMS[row][1]))
    del trainers
    figures = {}
    for row, (form, attention) in FORMS.items():
        options = {"stage": stage, "chunk": chunk}
        figures[row] = {**best(runs[row][1:]), "peak_gb": peak_gb(form, attention, (net, size, 1), options)}
        for other in [other for other in figures if not attention and FORMS[other][1]]:
            against = FORMS[other][1]
            figures[row][f"times_faster_than_{against}"] = figures[other]["step_s"] / figures[row]["step_s"]
            figures[row][f"memory_of_{against}"] = figures[row]["peak_gb"] / figures[other]["peak_gb"]
        yield f"stage {stage}, {row}", figures[row]


# ---- bytes kept for backward -----------------------------------------------------------------------------------------


def kept_bytes(objects: int = 8, size: int = 256, dtype=torch.bfloat16, trainable=None, checkpointing=False, **config) -> dict:
    """GiB that the UNet's forward keeps for backward under autocast, counted on fake tensors: distinct storages handed to
    autograd, without parameters and inputs."""
    with FakeTensorMode():
        network = unet.UNet(**config).train()
        network.set_checkpointing(checkpointing)
        optim.select_trainable(network, trainable)
        n, context = objects * ROWS, network.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.in_features
        given = [torch.empty(n, 8, size // 8, size // 8), torch.zeros(n, dtype=torch.long)]  # latents, time steps
        given += [torch.empty(n, 1, context), torch.empty(n, 10)]  # image tokens, cameras
        known = {t.untyped_storage()._cdata for t in (*network.parameters(), *given)}
        saved = {}

        def pack(t):
            storage = t.untyped_storage()
            if storage._cdata not in known:
                saved[storage._cdata] = storage  # held, so that its address is not used again
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype):
            out = network(*given)
        total = sum(storage.nbytes() for storage in saved.values())
        del out
    return {"saved_gib": total / 2**30}


# ---- loader ----------------------------------------------------------------------------------------------------------


def write_renders(root: Path, objects: int = 4, size: int = 512) -> None:
    """Shaded, textured balls on black with masks: about as hard to decode as real renders."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size * 2 - 1
    for i in range(objects):
        folder, rng = root / "abc" / f"abc{i}", np.random.default_rng(i)
        folder.mkdir(parents=True)
        for view in VIEW_NAMES:
            radius = 0.6 + 0.2 * rng.random()
            mask = x**2 + y**2 < radius**2
            normal = np.stack([x, -y, np.sqrt(np.clip(radius**2 - x**2 - y**2, 0, None))], -1) / radius
            noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
            color = np.asarray(noise) * (0.3 + 0.7 * normal[..., 2:])
            stored = {"rgb": color * mask[..., None], "normals": (normal + 1) * 127.5 * mask[..., None], "mask": mask * 255}
            for name, pixels in stored.items():
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}_000_{view}.png")


def published_read(data: MultiViewDataset, index: int) -> dict:
    """An object as the published loader reads it: float maths per view, normals in fp64, the condition view once more."""
    folder, size = data.root / data.objects[index][: data.k] / data.objects[index], (data.resolution,) * 2
    load = lambda name, view: np.array(Image.open(folder / f"{name}_000_{view}.png").resize(size))
    background = np.ones(3, np.float32)

    def color(view):
        alpha = np.float32(load("mask", view) > 0)[..., None]
        return torch.from_numpy(load("rgb", view).astype(np.float32) / 255.0 * alpha + background * (1 - alpha))

    def normal(view, rotation):
        alpha = np.float32(load("mask", view) > 0)[..., None]
        n = load("normals", view) / 255.0 * 2 - 1
        n = (rotation.astype(np.float64) @ n.reshape(-1, 3).T).T.reshape(*size, 3)
        return torch.from_numpy((n * 0.5 + 0.5).astype(np.float32) * alpha + background * (1 - alpha))

    to_chw = lambda images: torch.stack(images).permute(0, 3, 1, 2)
    condition = to_chw([color(data.condition_view)] * len(data.views))
    rotations = data.rotations[data.condition_view]
    return {
        "imgs_in": condition,
        "imgs_out": to_chw([color(view) for view in data.views]),
        "normals_out": to_chw([normal(view, r) for view, r in zip(data.views, rotations)]),
    }


def loader_rates(size: int = 512, resolution: int = 256, repeats: int = 3) -> dict:
    """Objects per second of one core, from PNG files of `size`: ours with and without the batched maths, and the published."""
    with tempfile.TemporaryDirectory() as folder:
        write_renders(Path(folder), size=size)
        names = sorted(p.name for p in (Path(folder) / "abc").iterdir())
        make = lambda kind: MultiViewDataset(folder, names, resolution=resolution, bg_color="white", pred_type=kind)
        data = {kind: make(kind) for kind in ("joint", "mix")}

        def rate(read) -> float:
            times = []
            for k in range(repeats * len(names)):
                start = time.process_time()
                read(k)
                times.append(time.process_time() - start)
            return 1 / statistics.median(times)

        def finished(k: int) -> None:
            sample = data["joint"].read(k)
            compose({key: torch.from_numpy(np.asarray(v))[None] for key, v in sample.items() if key != "name"})

        out = {"published_objects_per_s": rate(lambda k: published_read(data["joint"], k % len(names)))}
        out["joint_objects_per_s"] = rate(data["joint"].read)
        out["joint_with_maths_objects_per_s"] = rate(finished)
        out["mix_objects_per_s"] = rate(data["mix"].read)
    return out


# ---- all of it -------------------------------------------------------------------------------------------------------


def measure(device: str, config: str):
    """Yield (row, figures)."""
    tiny = config == "tiny"
    if device == "cuda":
        yield from measure_gpu(8, 256, 10)
    else:
        for stage in (1, 2):
            yield from compare_steps(*((TINY_NET, 64, 1) if tiny else (TEST_NET, 128, 5)), stage)
        yield "loader, one core", loader_rates(*((64, 32, 1) if tiny else (512, 256, 4)))
    changes = {"block_out_channels": (32, 32, 32, 32)} if tiny else {}
    for row, options in (
        ("all parameters", {}),
        ("cross-domain layers only", {"trainable": ["joint_mid"]}),
        ("all parameters, checkpointing", {"checkpointing": True}),
    ):
        yield f"kept for backward, 8 objects, 256 x 256, bf16, {row}", kept_bytes(**options, **changes)
    with published_form():
        yield "kept for backward, 8 objects, 256 x 256, bf16, published form", kept_bytes(**changes)


def measure_gpu(objects: int, size: int, count: int, net: dict = FULL_NET, device: str = "cuda", compiles=(False, True)):
    """Objects per second of training in bf16, with and without cache, checkpointing and compilation."""
    for form in ("encoded", "cached"):
        for checkpointing in (False, True):
            for compiled in compiles:
                options = {"amp": torch.bfloat16, "chunk": 32, "checkpointing": checkpointing, "compile": compiled}
                trainer = Trainer(net, size, objects, form, device, **options)
                runs = [run_step(trainer) for _ in range(3 + count)][3:]
                figures = best(runs)
                figures["objects_per_s"] = objects / statistics.median(run["step"] for run in runs)
                if device == "cuda":
                    figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
                    del trainer
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                yield f"{form}, checkpointing {checkpointing}, compile {compiled}", figures
