"""Train Pi3: points and cameras of an unordered set of images, in three stages.

  one process    python pi3/train.py --config pi3/configs/tiny.yaml
  eight GPUs     torchrun --nproc_per_node 8 pi3/train.py --config pi3/configs/train_pi3_lowres.yaml name=pi3_lowres
  stages 2, 3    ... --config pi3/configs/train_pi3_highres.yaml name=pi3_highres model.ckpt=PATH
                 ... --config pi3/configs/train_pi3_conf.yaml name=pi3_conf model.ckpt=PATH
  two machines   torchrun --nnodes 2 --node_rank RANK --master_addr HOST --nproc_per_node 8 pi3/train.py ... parallel=fsdp
  resume         the same command again
"""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from common import config, data, dist
from common.checkpoint import Checkpoints, apply_optimizer, apply_weights
from common.guard import StepGuard
from common.log import Logger, Progress, due
from pi3.dataset import Mixture, step_keys, unpack
from pi3.draw import training_picture
from pi3.eval import validate_samples
from pi3.loss import has_normals, pi3_loss
from pi3.model import Pi3, freeze
from pi3.options import check, sizes_at
from pi3.readers import CO3D, RGBDFolder, ScanNet, TartanAir
from pi3.schedule import beta1_at, lr_at, parameter_groups
from pi3.segformer import load_segformer
from pi3.weights import initialise, model_options

REFERENCE = Path(__file__).parent / "configs" / "default.yaml"
ALIASES = {
    "train.resume": "checkpoint",
    "train.num_workers": "workers",
    "train.base_seed": "seed",
    "log.max_checkpoints": "keep_last",
    "train.random_reslution": "train.num_resolution",  # spelt so in the official configs
    "train.random_resolution": "train.num_resolution",
    "test.iters_per_test": "test_dataset.iters_per_test",
}


def build_model(m) -> Pi3:
    """The network of a config's section `model`, on the CPU; initial weights follow torch's global generator."""
    memory = ("num_dec_blk_not_to_checkpoint", "num_dec_blk_to_checkpoint", "checkpoint_heads")
    model = Pi3(**model_options(m), **{key: m[key] for key in memory})
    freeze(model, encoder=m.freeze_encoder, all_but_conf=m.train_conf and m.conf_freeze)
    return model


def transformer_blocks(model: Pi3) -> list[nn.Module]:
    """What is compiled, and split among processes, one by one."""
    heads = [model.point_decoder, model.camera_decoder, model.conf_decoder, model.global_points_decoder]
    return [*model.encoder.blocks, *model.decoder, *(block for head in heads if head is not None for block in head.blocks)]


def compile_blocks(model: Pi3, one_size: bool, backend: str = "inductor") -> None:
    """Compile the blocks one by one; blocks of a kind share their graphs. `one_size`: all batches have the same shape."""
    # within views or over them, one sample or several, with gradient or without: more graphs than the 8 that are kept by default
    torch._dynamo.config.cache_size_limit = 64
    for block in transformer_blocks(model):
        block.compile(dynamic=False if one_size else None, backend=backend)


def build_optimizer(model: nn.Module, t) -> torch.optim.AdamW:
    """AdamW over what trains: encoder and the rest, each without and with weight decay."""
    o = t.optimizer
    groups = parameter_groups(model, o.lr, o.encoder_lr, o.weight_decay)
    return torch.optim.AdamW(groups, betas=tuple(o.betas), eps=1e-8, fused=True)


def build_reader(name: str, d, test: bool):
    """The reader of a data set; ValueError where its folder is not set."""
    key = "test_root" if test and "test_root" in d else "root"
    if not d[key]:
        switch = f"test_dataset.samples.{name}" if test else f"train_dataset.weights.{name}"
        raise ValueError(f"data.{name}.{key} is not set: give the folder of this data set, or set {switch}=0 to do without it")
    split = "test" if test else "train"
    if name == "tartanair":
        return TartanAir(d[key], d.whole_prob)
    if name == "scannet":
        return ScanNet(d.root, split, d.invalid_list, d.whole_prob)
    if name == "co3d":
        return CO3D(d.root, split, {"on": True, "true": True, "off": False, "false": False}.get(d.mask_bg, d.mask_bg), d.index)
    return RGBDFolder(d[key], d.depth_scale, d.z_far, d.label)


def build_dataset(cfg) -> Mixture:
    """The training samples, a pure function of seed and key."""
    t, weights = cfg.train_dataset, {name: w for name, w in cfg.train_dataset.weights.items() if w}
    readers = [build_reader(name, cfg.data[name], test=False) for name in weights]
    return Mixture(readers, list(weights.values()), cfg.seed, t.augment, t.aug_focal, t.aug_crop)


def build_test_sets(cfg) -> list[tuple[str, Mixture, int]]:
    """(name, samples without augmentation, their number) of every data set to validate on."""
    counts = {name: n for name, n in cfg.test_dataset.samples.items() if n}
    readers = {name: build_reader(name, cfg.data[name], test=True) for name in counts}
    return [(name, Mixture([readers[name]], [1.0], seed=0, train=False), n) for name, n in counts.items()]


def build_loader(dataset: Mixture, cfg, first_step: int, last_step: int):
    """This rank's micro-batches of steps first_step..last_step-1, in order; size and number of views are those of the step."""
    t, where = cfg.train, (dist.rank(), dist.world_size(), cfg.train.gradient_accumulation_steps)
    plan = lambda step: step_keys(cfg.seed, step, *where, t.image_num_range, t.max_img_per_gpu, sizes_at(step, t, cfg.seed))
    batches = (keys for step in range(first_step, last_step) for keys in plan(step))
    return data.loader(data.Guarded(dataset.read), batches, workers=cfg.workers)


def unsynced(net, alone: bool):
    """A context in which gradients stay on their process: those of all but the last micro-batch need not travel."""
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(not alone)
    return net.no_sync() if alone and isinstance(net, DistributedDataParallel) else nullcontext()


def train_step(
    net, sky: Callable | None, batches: list[dict], optimizer, scaler, guard: StepGuard, cfg, dtype, step: int, total_steps: int
) -> dict:
    """One optimizer step over the micro-batches; returns detached tensors and the rate. Nothing waits for this step's device work.

    sky: images (B, N, 3, H, W) to the mask (B, N, H, W) of their sky; given where the confidence is trained.
    """
    t, device, count, logged = cfg.train, guard.device, len(batches), {}
    optimizer.zero_grad(set_to_none=True)
    for i, batch in enumerate(batches):
        truth, normals = unpack(batch, device), has_normals(batch["dataset"], "cpu").to(device, non_blocking=True)
        with unsynced(net, i < count - 1):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                pred = net(truth["imgs"])
            clear = sky(truth["imgs"]) if sky else None
            terms = pi3_loss(pred, truth["local_points"], truth["poses"], truth["mask"], normals, clear, cfg.model.conf_target)
            loss = terms["loss"]
            within = loss.detach() <= t.clip_loss  # a wild micro-batch contributes nothing; nan and inf stay nan, for the guard
            scaler.scale(loss * within / count).backward()
        for name, value in (terms | {"clipped": 1 - within.float()}).items():
            logged[name] = logged.get(name, 0.0) + value.detach() / count
    scaler.unscale_(optimizer)
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    guard.settle()  # the flag of the step before
    done = step - guard.skipped
    for group in optimizer.param_groups:
        group["lr"] = lr_at(done, total_steps, group["base_lr"])
        if t.lr_scheduler.cycle_momentum:
            group["betas"] = (beta1_at(done, total_steps), group["betas"][1])
    scenes = dict.fromkeys(f"{d}/{s}" for batch in batches for d, s in zip(batch["dataset"], batch["sequence"]))
    where = f"step {step} (sequences of this process: {', '.join([*scenes][:12])})"
    optimizer.found_inf = guard.check(logged["loss"], norm, where)
    optimizer.grad_scale = (norm / (t.clip_grad or float("inf"))).clamp(min=1)  # clips: the fused update divides by it
    optimizer.step()  # fused: does nothing where found_inf is 1
    scaler.update()
    first = [values[0].detach() for values in (truth["local_points"][..., 2], truth["mask"], pred["local_points"][..., 2])]
    return {"logged": logged, "grad_norm": norm, "lr": optimizer.param_groups[-1]["lr"], "first": first}


def validate(net, sky: Callable | None, cfg, sets: list, device: torch.device, dtype, bad: data.BadSamples) -> dict[str, float]:
    """Scores of every validation set under NAME/, and their means weighted by samples; the model keeps its mode. `bad` is told what
    could not be read."""
    training, t, out = net.training, cfg.test_dataset, {}
    size = tuple(t.resolution or cfg.train.resolution or (518, 336))
    batch = max(1, cfg.train.max_img_per_gpu // t.image_num)
    net.eval()
    for name, source, count in sets:
        options = batch, device, dtype, cfg.workers, t.iters_per_test, sky, cfg.model.conf_target
        scores = validate_samples(net, source, count, t.image_num, size, *options)
        bad.add(scores.pop("bad"), 0)  # named once each; they never end the run
        n = scores.pop("samples")
        out |= {f"{name}/{key}": value for key, value in scores.items()} if len(sets) > 1 else {}
        for key, value in scores.items():
            out.setdefault(key, []).append((value, n))
    net.train(training)
    return {k: v if isinstance(v, float) else sum(x * n for x, n in v) / sum(n for _, n in v) for k, v in out.items()}


def whole(tree):
    """Tensors that are split among processes put together, on the CPU of the main one (None elsewhere). All processes call it."""
    if isinstance(tree, DTensor):
        full = tree.full_tensor()
        return full.cpu() if dist.is_main() else None
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(value) for value in tree] if isinstance(tree, list) else tree


def load_optimizer(optimizer, scaler, run: dict) -> None:
    """Load a state of whole tensors; where the parameters are split, every process keeps its part."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entry in run["optimizer"]["state"].items():
        p = params[number]
        if isinstance(p, DTensor):
            split = lambda t, p=p: distribute_tensor(t.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
            entry |= {key: split(value) for key, value in entry.items() if value.shape == p.shape and value.ndim}
    apply_optimizer(optimizer, scaler, run)


def describe(cfg, dataset: Mixture, model: Pi3, dtype, device, step: int, last_step: int, total_steps: int) -> str:
    """What the run is about to do."""
    t, world, K = cfg.train, dist.world_size(), model.num_dec_blk_not_to_checkpoint
    trained, every = (sum(p.numel() for p in model.parameters() if p.requires_grad or all_) for all_ in (False, True))
    sets = ", ".join(f"{r.label} {w:.0%} ({len(r)} sequences)" for r, w in zip(dataset.readers, dataset.weights))
    lo, hi = t.image_num_range
    depth, images, sizes = len(model.decoder), t.max_img_per_gpu, sizes_at(0, t, cfg.seed)
    blocks = f"checkpointing decoder blocks {K}..{depth - 1}" if depth > K else "no checkpointing"
    return (
        f"{sets}\n{images} images at most a rank x {t.gradient_accumulation_steps} micro-batches x {world} ranks = "
        f"{images * t.gradient_accumulation_steps * world} images a step, in samples of {lo}..{min(hi, images)} views, "
        f"{len(sizes)} sizes {'x'.join(map(str, sizes[0]))}..{'x'.join(map(str, sizes[-1]))}; "
        f"steps {step}..{last_step} of {total_steps}\n{every / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained, on {device}, "
        f"{cfg.parallel if world > 1 else 'one process'}, amp {str(dtype).removeprefix('torch.')}, {blocks}"
    )


def main() -> None:
    cfg = config.parse(sys.argv[1:], __doc__, REFERENCE, aliases=ALIASES)
    cfg.workspace = cfg.workspace or f"outputs/{cfg.name}"
    check(cfg)
    device = dist.init(cfg.timeout)
    stop, world, folder, t = dist.StopSignal(), dist.world_size(), Path(cfg.workspace), cfg.train
    if cfg.parallel not in ("ddp", "fsdp"):
        raise ValueError(f"parallel {cfg.parallel!r}: expected ddp or fsdp")
    log = Logger(folder, cfg)
    if cfg.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)  # names what has no such form
    torch.manual_seed(cfg.seed)  # initial weights: the same on all ranks

    total_steps = t.num_epoch * t.iters_per_epoch  # of the schedule
    last_step = min(total_steps, cfg.max_steps or total_steps)
    save_every = cfg.save_every or cfg.log.ckpt_interval * t.iters_per_epoch
    validate_every = cfg.validate_every or t.iters_per_epoch
    segformer = load_segformer(cfg.sky.ckpt).to(device) if cfg.model.train_conf else None
    sky = (lambda imgs: segformer.sky(imgs, cfg.sky.normalize)) if segformer else None
    dataset, test_sets = build_dataset(cfg), build_test_sets(cfg)
    model = build_model(cfg.model)
    checkpoints = Checkpoints(folder / "checkpoint", cfg.keep_last, cfg.keep_every, log.text)
    state = checkpoints.load(cfg.checkpoint if t.auto_resume or cfg.checkpoint != "latest" else "none")
    if state:
        apply_weights(model, state[""]["model"])
    else:
        if not t.resolution and not cfg.model.ckpt:
            log.text("WARNING: a stage with varying sizes is meant to start from the weights of stage lowres: model.ckpt=PATH")
        for note in initialise(model, cfg.model):
            log.text(note)
    model.to(device)
    if cfg.compile:
        compile_blocks(model, one_size=bool(t.resolution) and t.image_num_range[0] == t.image_num_range[1])
    split = world > 1 and cfg.parallel == "fsdp"
    if split:
        for block in (*transformer_blocks(model), model):
            fully_shard(block)
    net = model
    if world > 1 and not split:
        net = DistributedDataParallel(model, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    optimizer = build_optimizer(model, t)
    dtype = dist.autocast_dtype(cfg.amp, device)
    if split and dtype == torch.float16:
        raise ValueError("parallel fsdp takes amp bf16 or off: the loss scaling of fp16 does not know split gradients")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, skipped, best = 0, 0, float("inf")
    if state and "optimizer" in state:
        run = state["optimizer"]
        load_optimizer(optimizer, scaler, run)
        step, skipped, best = state["step"], run["skipped"], run["best"]
        log.text(f"resumed at step {step}")
    elif state:
        log.text(f"{cfg.checkpoint}: weights only, starting at step 0")
    del state
    log.text(describe(cfg, dataset, model, dtype, device, step, last_step, total_steps))

    say = log.text if dist.is_main() else lambda line: print(f"rank {dist.rank()}: {line}", flush=True)
    guard = StepGuard(model, cfg.max_bad_steps, skipped, say)
    bad = data.BadSamples(cfg.max_bad_fraction, log.warn)
    batches = build_loader(dataset, cfg, step, last_step)
    bad_test = data.BadSamples(1.0, log.text)  # names them, and no more
    progress, since, images = Progress(last_step, step, log), step, 0
    net.train()
    while step < last_step:
        dist.at(step, "data")
        tick = time.perf_counter()
        micro = [next(batches) for _ in range(t.gradient_accumulation_steps)]
        progress.waited(time.perf_counter() - tick)
        for batch in micro:
            bad.add(batch["bad"], len(batch["sequence"]))
        images += len(micro) * world * micro[0]["images"].shape[0] * micro[0]["images"].shape[1]
        dist.at(step, "train step")
        dist.seed_step(cfg.seed, step, dist.rank())
        out = train_step(net, sky, micro, optimizer, scaler, guard, cfg, dtype, step, total_steps)
        step += 1

        if due(step, cfg.log_every) or step == last_step:
            if not split:
                dist.check_drift(model.parameters(), step)
            losses = dist.all_mean({f"loss/{name}": value for name, value in out["logged"].items()})
            run = {"train/grad_norm": out["grad_norm"], "train/lr": out["lr"], "train/skipped": guard.skipped}
            run |= {"train/views": micro[0]["images"].shape[1], "train/pixels": out["first"][1][0].numel()}
            run["train/bad_samples"] = bad.total()
            speed = progress.update(step, losses["loss/loss"], out["lr"], images / (step - since))  # samples here are images
            speed["time/images_per_s"], since, images = speed.pop("time/samples_per_s"), step, 0
            log.scalars(step, losses | run | speed)
        if due(step, cfg.vis_every) and dist.is_main():
            maps = [values.cpu().numpy() for values in out["first"]]
            log.image(step, "train/image_truth_depth", training_picture(micro[-1]["images"][0].numpy(), *maps))
        if test_sets and (due(step, validate_every) or step == last_step):
            scores = validate(model, sky, cfg, test_sets, device, dtype, bad_test)
            log.scalars(step, {f"val/{name}": value for name, value in scores.items()})
            names = ("loss", "auc@30", "rra@30", "rta@30", "rot_deg", "trans_deg", "point_error")
            log.text(f"step {step}: " + "  ".join(f"{name} {scores[name]:.4g}" for name in names))
            if scores["loss"] < best:
                best, weights = scores["loss"], whole(model.state_dict())
                if dist.is_main():
                    about = {"config": model_options(cfg.model), "step": step, "scores": scores}
                    checkpoints.save_weights("best.pt", {"model": weights, **about})
        stopping = stop.agreed()
        if due(step, save_every) or step == last_step or stopping:
            dist.at(step, "save")
            guard.settle()
            if not split:
                dist.check_drift(model.parameters(), step)
            weights, moments = whole(model.state_dict()), whole(optimizer.state_dict())
            if dist.is_main():
                run = {"optimizer": moments, "scaler": scaler.state_dict(), "skipped": guard.skipped, "best": best}
                checkpoints.save(step, {"": {"model": weights, "config": model_options(cfg.model)}, "optimizer": run})
        if stopping:
            log.text(f"stop signal: saved at step {step}; the same command goes on from here")
            break
    progress.close()
    failed = checkpoints.wait()
    log.close()
    net = None  # DDP goes before its process group
    dist.shutdown()
    if failed:
        sys.exit(failed)


if __name__ == "__main__":
    main()
