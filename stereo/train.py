"""Train FoundationStereo, disparity from a rectified pair of images.

  one process    python stereo/train.py --config stereo/configs/tiny.yaml
  eight GPUs     torchrun --nproc_per_node 8 stereo/train.py --config stereo/configs/paper.yaml --vit_checkpoint da_v2.pth
  two machines   torchrun --nnodes 2 --node_rank RANK --master_addr HOST --nproc_per_node 8 stereo/train.py --config ...
  resume         the same command again
"""

import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of stereo/

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import config, data, dist
from common.checkpoint import Checkpoints, apply_optimizer, apply_weights, load_weights
from common.guard import StepGuard
from common.log import Averages, Logger, Progress, due
from stereo import recipe
from stereo.dataset import Source, StereoDataset, make_sources
from stereo.draw import draw_samples
from stereo.ema import make_ema, update_ema
from stereo.eval import evaluate, predictor
from stereo.metrics import batch_metrics
from stereo.model import FoundationStereo
from stereo.weights import load_depth_anything, load_edgenext, model_options

REFERENCE = Path(__file__).parent / "configs" / "paper.yaml"
ALIASES = {"enable_mixed_precision": "amp", "finetune": "init", "eval_every": "validate_every", "sync_bn": "bn"}
FREE = ("model", "loss", "optimizer", "lr_scheduler", "data.datasets", "data.val_datasets")  # a user's file gives them whole


def build_model(cfg, stored: dict | None, say) -> FoundationStereo:
    """The network of the config, on the CPU, with weights of `stored` (a resumed run), of `init`, or pretrained branches."""
    if cfg.bn not in (None, "train", "frozen", "sync"):
        raise ValueError(f"bn '{cfg.bn}' must be train, frozen, sync or null")
    state = stored or (load_weights(cfg.init) if cfg.init else None)
    options, notes = model_options({**config.read(REFERENCE).model, **cfg.model}, state)
    frozen = cfg.bn == "frozen" or (cfg.bn is None and cfg.init is not None)
    model = FoundationStereo(**options, checkpointing=cfg.enable_gradient_checkpointing, bn_frozen=frozen)
    model.options = options  # kept in every checkpoint, so that eval.py and infer.py need no config
    if state:
        notes.append(apply_weights(model, state, strict=bool(stored) or cfg.init_strict))
    else:
        if options.get("vit_size") and cfg.vit_checkpoint:
            load_depth_anything(model, load_weights(cfg.vit_checkpoint))
        elif options.get("vit_size") and not cfg.allow_random_vit:
            remedy = f"--vit_checkpoint depth_anything_v2_{options['vit_size']}.pth, --init with a FoundationStereo checkpoint"
            raise ValueError(f"the monocular branch is frozen and needs trained weights: give {remedy}, or model.vit_size null")
        if cfg.cnn_checkpoint:
            load_edgenext(model, load_weights(cfg.cnn_checkpoint))
    for note in notes:
        say(note)
    return model


def build_optimizer(model: nn.Module, cfg) -> torch.optim.Optimizer:
    """Groups by name patterns, and vectors without weight decay where the config says so (stereo/recipe.py)."""
    return recipe.make_optimizer(model, cfg.optimizer)


def lr_at(step: int, group: dict, cfg) -> float:
    """Learning rate of update `step` in a parameter group."""
    base = group["base_lr"]
    return base * recipe.lr_factor(cfg.lr_scheduler, step, base, group["entry"], steps=cfg.num_iterations)


def build_dataset(cfg, model: FoundationStereo, seed: int) -> StereoDataset:
    """The training pairs, a pure function of (seed, position)."""
    d = cfg.data
    shared = {key: d[key] for key in ("image_augmentation", "stereo_augmentation", "jitter")}
    return StereoDataset(
        make_sources(d.datasets, **shared),
        seed=seed,
        max_disparity=d.max_disparity or model.max_disp,
        labels=list(cfg.loss),
        image_sizes=d.image_sizes,
        **{key: d[key] for key in ("area_range", "aspect_ratio_range", "min_valid", "epoch_sampling", "resize_to_fit")},
        **{key: d[key] for key in ("flip_probability", "vertical_flip_probability", "erase_scale")},
    )


def build_loader(dataset: StereoDataset, cfg, first_step: int, last_step: int):
    """This rank's micro-batches of steps first_step..last_step-1, in order; all samples of a step have one size."""
    rank, world, parts = dist.rank(), dist.world_size(), cfg.gradient_accumulation_steps
    pairs = cfg.batch_size_forward * parts * world  # a step
    steps = range(first_step, last_step)
    batches = ([(p, step) for p in micro] for step in steps for micro in data.positions(step, pairs, rank, world, parts))
    return data.loader(data.Guarded(dataset.read), batches, workers=cfg.workers)


def train_step(
    net, model, ema, batches: list[dict], optimizer, scaler, guard: StepGuard, cfg, dtype, step: int, max_disparity: float
) -> dict:
    """One optimizer step; returns {"logs": the values of each micro-batch, ...}, detached. Nothing waits for its device work."""
    device, count, every = guard.device, len(batches), recipe.needs_all(cfg.loss)
    optimizer.zero_grad(set_to_none=True)
    mean, logs = torch.zeros((), device=device), []
    for i, batch in enumerate(batches):
        left, right, truth, mask, label = (
            batch[key].to(device, non_blocking=True)
            for key in ("left_image", "right_image", "disparity", "disparity_mask", "label")
        )
        # (B, H, W, 3) uint8 -> (B, 3, H, W) 0..255, contiguous: on channels-last oneDNN (torch 2.11) corrupts memory in the
        # backward pass of narrow convolutions
        left, right = (v.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) for v in (left, right))
        alone = i < count - 1 and net is not model  # gradients travel with the last micro-batch
        with net.no_sync() if alone else nullcontext():
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                out = net(left, right, iters=cfg.train_iters, every_iteration=every)
            loss, parts = recipe.total_loss(out, truth, mask, label, cfg.loss, max_disparity)
            scaler.scale(loss / count).backward()
        mean += loss.detach() / count
        losses = {f"loss/{name}": value for name, value in ({"loss": loss.detach()} | parts).items()}
        logs.append(losses | batch_metrics(out["preds"][-1].detach().squeeze(1), out["init"].detach(), truth, mask))
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(trained, cfg.grad_clip or math.inf)
    guard.settle()  # the flag of the step before
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step - guard.skipped, group, cfg)
    pairs = cfg.batch_size_forward * count * dist.world_size()
    flag = guard.check(mean, grad_norm, f"step {step}, samples {step * pairs}..{(step + 1) * pairs - 1}")
    optimizer.found_inf = flag
    optimizer.step()  # fused: does nothing where found_inf is 1
    scaler.update()
    if ema is not None:
        update_ema(ema, model, cfg.ema_decay, skip=flag)
    return {"logs": logs, "grad_norm": grad_norm, "lr": optimizer.param_groups[0]["lr"]}


def validate(model: FoundationStereo, sets: list[Source], cfg, device: torch.device, dtype, step: int) -> tuple[dict, list[str]]:
    """{"NAME/epe": ...} of every validation set, and means over the sets; and a line for each pair that could not be read.

    Pairs are shared out over the ranks.
    """
    training, out, bad = model.training, {}, []
    dist.broadcast_buffers(model)  # the scores are those of the weights that are saved
    run = predictor(model.eval(), device, cfg.valid_iters, dtype=dtype)
    limit = cfg.data.max_disparity or model.max_disp
    for source in sets:
        pairs = source.pairs[: cfg.validate_pairs]
        result = evaluate({"model": lambda left, right, *_: run(left, right)}, pairs, source.mask, limit, step=step)["model"]
        out |= {f"{source.name}/{key}": value for key, value in result["per_image"].items()}
        for key, value in result["per_image"].items():
            out[key] = out.get(key, 0.0) + value / len(sets)
        bad += result["bad"].values()
    model.train(training)
    return out | {"bad_pairs": len(bad)}, bad


def describe(cfg, dataset, model, dtype, device, step: int, last_step: int) -> str:
    """What the run is about to do, in a line."""
    world, parts = dist.world_size(), cfg.gradient_accumulation_steps
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = ", ".join(f"{w}x{h}" for h, w in dataset.sizes) or f"areas of {dataset.area}"
    total = sum(p.numel() for p in model.parameters())
    return (
        f"{len(dataset)} pairs; {cfg.batch_size_forward} a rank x {parts} micro-batches x {world} ranks = "
        f"{cfg.batch_size_forward * parts * world} pairs a step of {sizes}, steps {step}..{last_step} of {cfg.num_iterations}; "
        f"{total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained, on {device}, amp {str(dtype).removeprefix('torch.')}, "
        f"batch norms {'frozen' if model.bn_frozen else 'training'}, {'with' if cfg.enable_ema else 'without'} EMA"
    )


def main() -> None:
    cfg = config.parse(sys.argv[1:], __doc__, REFERENCE, aliases=ALIASES, free=FREE)
    cfg.bn = {True: "sync", False: None}.get(cfg.bn, cfg.bn)  # --sync_bn
    weights = Path(str(cfg.checkpoint))
    if weights.suffix and weights.is_file() and not Checkpoints.owns(weights):  # of no run to resume: the same as --init
        cfg.init, cfg.checkpoint = str(weights), "none"
    device = dist.init(cfg.timeout)
    stop, world, folder = dist.StopSignal(), dist.world_size(), Path(cfg.workspace)
    log = Logger(folder, cfg)
    if cfg.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)  # names what has no such form
    torch.backends.cudnn.benchmark = not cfg.deterministic and len(cfg.data.image_sizes or ()) == 1  # not when sizes vary
    torch.manual_seed(cfg.seed)  # initial weights: the same on all ranks

    recipe.check(cfg)
    last_step = min(cfg.num_iterations, cfg.max_steps or cfg.num_iterations)
    checkpoints = Checkpoints(folder / "checkpoint", cfg.keep_last, cfg.keep_every, log.text)
    state = checkpoints.load(cfg.checkpoint)
    model = build_model(cfg, state and state[""]["model"], log.text).to(device)
    if world > 1 and device.type == "cuda" and not model.bn_frozen and cfg.bn in (None, "sync"):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    dataset = build_dataset(cfg, model, cfg.seed)
    val_sets = make_sources(cfg.data.val_datasets, split="test")
    optimizer = build_optimizer(model, cfg)
    if cfg.amp_dtype not in (None, "bf16", "fp16"):
        raise ValueError(f"amp_dtype '{cfg.amp_dtype}' must be bf16, fp16 or null")
    dtype = dist.autocast_dtype(cfg.amp_dtype or "on" if cfg.amp == "on" else cfg.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    ema = make_ema(model) if cfg.enable_ema else None
    step, skipped, averages = 0, 0, Averages()
    if state and "optimizer" in state:
        step, skipped = state["step"], state["optimizer"]["skipped"]
        apply_optimizer(optimizer, scaler, state["optimizer"])
        averages.load(state["optimizer"].get("window", []), device)
        if ema is not None and "ema" in state:
            apply_weights(ema, state["ema"]["model"])
        log.text(f"resumed at step {step}")
    elif state:
        log.text(f"{cfg.checkpoint}: weights only, starting at step 0")
    del state
    last_step = int(min(last_step, step + (cfg.max_steps_per_run or last_step)))
    if cfg.enable_mlflow and dist.is_main():
        log.text(f"logging to TensorBoard ({folder / 'tb'}) and {folder / 'metrics.jsonl'}")
    for size in dataset.sizes:
        if size[0] > size[1]:
            log.text(f"WARNING: image_sizes has {size[1]}x{size[0]} (width x height), taller than wide: is that meant?")
    log.text(describe(cfg, dataset, model, dtype, device, step, last_step))

    vis = []
    if cfg.vis_every and dist.is_main():  # samples of a stream of their own
        vis = [data.Guarded(build_dataset(cfg, model, cfg.seed + 1).read)[number] for number in range(cfg.num_vis_images)]
    if cfg.compile:
        model.compile_step()
    guard = StepGuard(model, cfg.max_bad_steps, skipped, log.text)
    net = model
    if world > 1:
        net = DistributedDataParallel(model, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    bad = data.BadSamples(cfg.max_bad_fraction, log.warn)
    batches = build_loader(dataset, cfg, step, last_step)
    progress = Progress(last_step, step, log)
    pairs = cfg.batch_size_forward * cfg.gradient_accumulation_steps * world
    max_disparity, unread = dataset.max_disparity, set()
    model.train()
    while step < last_step:
        dist.at(step, "data")
        tick = time.perf_counter()
        micro = [next(batches) for _ in range(cfg.gradient_accumulation_steps)]
        progress.waited(time.perf_counter() - tick)
        for batch in micro:
            bad.add(batch["bad"], cfg.batch_size_forward)
        dist.at(step, "train step")
        dist.seed_step(cfg.seed, step, dist.rank())
        out = train_step(net, model, ema, micro, optimizer, scaler, guard, cfg, dtype, step, max_disparity)
        for values in out["logs"]:
            averages.add(values)
        step += 1

        if due(step, cfg.log_every) or step == last_step:
            dist.check_drift(model.parameters(), step)
            values = averages.take()
            run = {"train/grad_norm": out["grad_norm"], "train/lr": out["lr"], "train/skipped": guard.skipped}
            run["train/bad_samples"] = bad.total()
            log.scalars(step, values | run | progress.update(step, values.get("loss/loss", math.nan), out["lr"], pairs))
        if vis and due(step, cfg.vis_every):
            shown = ema or model
            draw_samples(predictor(shown.eval(), device, cfg.valid_iters, dtype=dtype), vis, log, step)
            model.train()
        if val_sets and (due(step, cfg.validate_every) or step == last_step):
            dist.at(step, "validate")
            scores, failures = validate(ema or model, val_sets, cfg, device, dtype, step)
            for reason in [reason for reason in failures if reason not in unread]:
                log.text(f"WARNING: validation pair left out: {reason}")
            unread |= set(failures)
            log.scalars(step, {f"val/{name}": value for name, value in scores.items()})
            rates = "  ".join(f"{name} {scores[name]:.2f}" for name in ("bp1", "bp2", "bp3"))
            log.text(f"step {step}: EPE {scores['epe']:.3f}  {rates}")
        stopping = stop.agreed()
        if due(step, cfg.save_every) or step == last_step or stopping:
            dist.at(step, "save")
            guard.settle()
            dist.check_drift(model.parameters(), step)
            window = averages.state()
            if dist.is_main():
                about = {"model_config": model.options}
                run = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "skipped": guard.skipped, "step": step}
                run["window"] = window
                parts = {"": {"model": model.state_dict(), **about}, "optimizer": run | about}
                checkpoints.save(step, parts | ({"ema": {"model": ema.state_dict(), **about}} if ema is not None else {}))
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
