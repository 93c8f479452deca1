"""Train LBM, an online tracker of any pixel in a video.

one process    python lbm/train.py --config lbm/configs/tiny.yaml
four GPUs      torchrun --nproc_per_node 4 lbm/train.py --config lbm/configs/default.yaml --movi_f_root data/kubric_lbm
two machines   torchrun --nnodes 2 --node_rank RANK --master_addr HOST --nproc_per_node 4 lbm/train.py --config ...
resume         the same command again
"""

import math
import sys
import time
import warnings
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of lbm/

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import config, data, dist
from common.checkpoint import Checkpoints, apply_optimizer, apply_weights
from common.guard import StepGuard
from common.io import contact_sheet
from common.log import Logger, Progress, due
from lbm.dataset import KubricDataset
from lbm.draw import draw_tracks
from lbm.eval import MODEL_KEYS, evaluate, table
from lbm.model import LBM, LOSS_NAMES, load_checkpoint, load_resnet18
from lbm.tapvid import FILES, find_files

REFERENCE = Path(__file__).parent / "configs" / "default.yaml"
ALIASES = {
    "config_path": "config",
    "train_root": "movi_f_root",
    "val_root": "tapvid_root",
    "checkpoint_path": "checkpoint",
    "model_save_path": "workspace",
}


LEAST = {"T": 2, "log_every": 0, "vis_every": 0, "grad_clip": 0}
LEAST |= dict.fromkeys(("N", "bs", "epoch_num", "max_steps", "validate_videos", "eval_memory_size"), 1)


def check(cfg) -> None:
    """SystemExit naming the key for what would train nothing, or fail only later; the model checks its own arguments."""
    for key, least in LEAST.items():
        if cfg[key] is not None and cfg[key] < least:
            raise SystemExit(f"{key} is {cfg[key]}: it must be at least {least}")
    if cfg.eval_dataset not in FILES:
        raise SystemExit(f"eval_dataset is '{cfg.eval_dataset}', it must be one of {', '.join(FILES)}")
    if cfg.tapvid_root:
        find_files(cfg.tapvid_root, cfg.eval_dataset)  # missing: an error now, not after the first epoch
    elif cfg.validation:
        raise SystemExit("validation needs data: set tapvid_root")


def model_config(cfg) -> dict:
    """The constructor arguments of the network: kept in every checkpoint, so that eval.py and infer.py need no config."""
    return {key: cfg[key] for key in MODEL_KEYS}


def build_model(cfg) -> LBM:
    """The network of the config, on the CPU; initial weights follow torch's global generator."""
    return LBM(**model_config(cfg))


def build_optimizer(model: nn.Module, cfg) -> torch.optim.AdamW:
    """AdamW, one group with all parameters in the order of the official optimizer state (norms and biases decay too)."""
    return torch.optim.AdamW(list(model.parameters()), lr=cfg.lr, weight_decay=cfg.wd, betas=(0.9, 0.999), eps=1e-8, fused=True)


def lr_at(step: int, total_steps: int, base_lr: float) -> float:
    """Learning rate of update `step`: linear warm-up over 1 % of the run from 1e-5 of the rate, then a cosine to 0."""
    warmup = max(1, int(0.01 * total_steps))
    if step <= warmup:
        return base_lr * (1e-5 + (1 - 1e-5) * step / warmup)
    return base_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total_steps - warmup))))


def build_dataset(cfg) -> KubricDataset:
    """The training clips, a pure function of (seed, position)."""
    return KubricDataset(
        cfg.movi_f_root,
        seed=cfg.seed,
        size=tuple(cfg.input_size),
        frames=cfg.T,
        points=cfg.N,
        augment=cfg.augment,
        aug_scale=cfg.aug_scale,
        min_points=cfg.min_points,
    )


def build_loader(dataset: KubricDataset, cfg, first_step: int, last_step: int):
    """Batches of steps first_step..last_step-1 for this rank, in order."""
    rank, world = dist.rank(), dist.world_size()
    batches = (data.positions(step, cfg.bs * world, rank, world)[0] for step in range(first_step, last_step))
    return data.loader(data.Guarded(dataset.read), batches, workers=cfg.workers)


def train_step(
    model, batch: dict, optimizer, scaler, guard: StepGuard, cfg, dtype: torch.dtype | None, step: int, total_steps: int
) -> dict:
    """One optimizer step; returns detached tensors and the learning rate. Nothing here waits for this step's device work."""
    device = guard.device
    video, queries, tracks, visible, valid = (
        batch[key].to(device, non_blocking=True) for key in ("video", "queries", "tracks", "visible", "valid")
    )
    video = video.permute(0, 1, 4, 2, 3)  # (B, T, H, W, 3) uint8 -> (B, T, 3, H, W)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        out = model(video, queries, tracks, visible, valid)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(out["loss"]).backward()
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    guard.settle()  # the flag of the step before
    lr = lr_at(step - guard.skipped, total_steps, cfg.lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    clips = cfg.bs * dist.world_size()
    optimizer.found_inf = guard.check(out["loss"], grad_norm, f"step {step}, samples {step * clips}..{(step + 1) * clips - 1}")
    optimizer.step()  # fused: does nothing where found_inf is 1
    scaler.update()
    return {name: value.detach() for name, value in out.items()} | {"grad_norm": grad_norm, "lr": lr}


def validate(model: LBM, cfg, device: torch.device) -> dict[str, float]:
    """TAP-Vid metrics (x100) of the config's validation set, shared out over the ranks; the weights stay as they are."""
    dist.broadcast_buffers(model)  # the scores are those of the weights that are saved
    scores = evaluate(
        model, cfg.tapvid_root, cfg.eval_dataset, device, memory_size=cfg.eval_memory_size, limit=cfg.validate_videos
    )
    return {name: value for name, value in scores.items() if name != "per_video"}


def picture(batch: dict, out: dict[str, Tensor]):
    """The first clip of a batch with its truth (upper row) and the predicted tracks (lower row), uint8 (h, w, 3)."""
    frames, keep = batch["video"][0].numpy(), batch["valid"][0].numpy()
    true = draw_tracks(frames, batch["tracks"][0].numpy()[:, keep], batch["visible"][0].numpy()[:, keep])
    points, visible = out["points"][0].cpu().numpy()[:, keep], out["visibility"][0].cpu().numpy()[:, keep]
    mine = draw_tracks(frames, points, visible)
    shown = range(0, len(frames), max(1, len(frames) // 4))
    return contact_sheet([true[t] for t in shown] + [mine[t] for t in shown], columns=len(shown))


def resume(cfg, checkpoints: Checkpoints, model: LBM, optimizer, scaler, log: Logger) -> dict:
    """Load what `checkpoint` names. Returns {"step", "epoch", "skipped", "best"}, zero and empty for a new run; an official file
    counts epochs only."""
    start, path = {"step": 0, "epoch": 0, "skipped": 0, "best": {}}, Path(str(cfg.checkpoint))
    if path.is_file() and not Checkpoints.owns(path):  # an official file, or a best_*.pt of ours
        loaded = load_checkpoint(model, path)
        if loaded["optimizer"] is not None:
            apply_optimizer(optimizer, scaler, loaded)
            start["epoch"] = loaded["epoch"] or 0
        notes = [*loaded["notes"], f"{path}: weights loaded, going on at epoch {start['epoch']}"]
    elif state := checkpoints.load(cfg.checkpoint):
        apply_weights(model, state[""]["model"])
        apply_optimizer(optimizer, scaler, state["optimizer"])
        start |= {"step": state["step"], "skipped": state["optimizer"]["skipped"], "best": state["optimizer"]["best"]}
        notes = [f"resumed at step {state['step']}"]
    else:
        if cfg.validation and not cfg.init:
            raise SystemExit(f"validation: no checkpoint in {checkpoints.folder}; name one as checkpoint, or weights as init")
        notes = load_resnet18(model, cfg.resnet18) if cfg.resnet18 else []
        notes += load_checkpoint(model, cfg.init)["notes"] + [f"weights from {cfg.init}"] if cfg.init else []
    for note in notes:
        log.text(note)
    return start


def main() -> None:
    cfg = config.parse(sys.argv[1:], __doc__, REFERENCE, aliases=ALIASES)
    check(cfg)
    device = dist.init(cfg.timeout)
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # of 1x1 convolutions, which have two layouts
    stop, world, folder = dist.StopSignal(), dist.world_size(), Path(cfg.workspace)
    log = Logger(folder, cfg)
    if cfg.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)  # names what has no such form
    torch.backends.cudnn.benchmark = not cfg.deterministic
    torch.manual_seed(cfg.seed)  # initial weights: the same on all ranks

    model = build_model(cfg).to(device)
    optimizer = build_optimizer(model, cfg)
    dtype = dist.autocast_dtype(cfg.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    checkpoints = Checkpoints(folder / "checkpoint", cfg.keep_last, cfg.keep_every, log.text)
    start = resume(cfg, checkpoints, model, optimizer, scaler, log)
    if cfg.validation:
        log.text(table({cfg.eval_dataset: validate(model, cfg, device)}))
        return dist.shutdown()

    dataset = build_dataset(cfg)
    clips = cfg.bs * world  # per step
    steps_per_epoch = max(1, len(dataset) // clips)
    total_steps = steps_per_epoch * cfg.epoch_num  # of the schedule
    last_step = min(total_steps, cfg.max_steps or total_steps)
    save_every, validate_every = cfg.save_every or steps_per_epoch, cfg.validate_every or steps_per_epoch
    step, best = start["step"] or start["epoch"] * steps_per_epoch, start["best"]
    log.text(
        f"{len(dataset)} clips; {cfg.bs} a rank x {world} ranks = {clips} clips a step, {steps_per_epoch} steps an epoch, "
        f"steps {step}..{last_step} of {total_steps}; {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}, "
        f"amp {str(dtype).removeprefix('torch.')}, msda {model.msda_name(device)}"
    )
    if cfg.compile:
        model.compile_step()
    guard = StepGuard(model, cfg.max_bad_steps, start["skipped"], log.text)
    net = model
    if world > 1:
        net = DistributedDataParallel(model, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    bad = data.BadSamples(cfg.max_bad_fraction, log.warn)
    batches = build_loader(dataset, cfg, step, last_step)
    progress = Progress(last_step, step, log)
    model.train()
    while step < last_step:
        dist.at(step, "data")
        tick = time.perf_counter()
        batch = next(batches)
        progress.waited(time.perf_counter() - tick)
        bad.add(batch["bad"], cfg.bs)
        dist.at(step, "train step")
        dist.seed_step(cfg.seed, step, dist.rank())
        out = train_step(net, batch, optimizer, scaler, guard, cfg, dtype, step, total_steps)
        step += 1

        if due(step, cfg.log_every) or step == last_step:
            dist.check_drift(model.parameters(), step)
            losses = dist.all_mean({f"loss/{name}": out[name] for name in ("loss", *LOSS_NAMES)})
            state = {
                "train/grad_norm": out["grad_norm"],
                "train/lr": out["lr"],
                "train/skipped": guard.skipped,
                "train/bad_samples": bad.total(),
            }
            log.scalars(step, losses | state | progress.update(step, losses["loss/loss"], out["lr"], clips))
        if due(step, cfg.vis_every) and dist.is_main():
            log.image(step, "train/tracks", picture(batch, out))
        if cfg.tapvid_root and (due(step, validate_every) or step == last_step):
            scores = validate(model, cfg, device)
            log.scalars(step, {f"val/{name}": value for name, value in scores.items()})
            log.text(f"step {step}: AJ {scores['aj']:.2f}  delta_avg {scores['delta_avg']:.2f}  OA {scores['oa']:.2f}")
            for name in ("aj", "delta_avg", "oa"):
                if scores[name] > best.get(name, -1.0):
                    best[name] = scores[name]
                    if dist.is_main():
                        weights = {"model": model.state_dict(), "config": model_config(cfg), "step": step, "scores": scores}
                        checkpoints.save_weights(f"best_{name.removesuffix('_avg')}.pt", weights)
        stopping = stop.agreed()
        if due(step, save_every) or step == last_step or stopping:
            dist.at(step, "save")
            guard.settle()
            dist.check_drift(model.parameters(), step)
            if dist.is_main():
                run = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "skipped": guard.skipped, "best": best}
                checkpoints.save(step, {"": {"model": model.state_dict(), "config": model_config(cfg)}, "optimizer": run})
        if stopping:
            way = "the same command" if cfg.checkpoint == "latest" else "the same command with --checkpoint latest"
            log.text(f"stop signal: saved at step {step}; {way} goes on from here")
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
