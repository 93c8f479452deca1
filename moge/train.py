"""Train MoGe, the point map of a single image: version 1 (affine-invariant points and mask) or 2 (also normals and metric scale).

one process    python moge/train.py --config moge/configs/tiny.yaml
eight GPUs     torchrun --nproc_per_node 8 moge/train.py --config moge/configs/v1.json --backbone_weights dinov2_vitl14_pretrain.pth
two machines   torchrun --nnodes 2 --node_rank RANK --master_addr HOST --nproc_per_node 8 moge/train.py --config ...
resume         the same command again
"""

import copy
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of moge/

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import config, data, dist
from common.checkpoint import Checkpoints, apply_optimizer
from common.guard import StepGuard
from common.log import Averages, Logger, Progress, due
from moge import dinov2, optimization
from moge.dataset import MoGeDataset, batch_keys, batch_size, unpack
from moge.draw import draw_samples, draw_truth
from moge.eval import evaluate, list_samples, predictor, summary
from moge.loss import check_table, total_loss
from moge.model import MoGe, build, load_weights, read_checkpoint
from moge.optimization import update_ema

REFERENCE = Path(__file__).parent / "configs" / "default.yaml"
ALIASES = {"enable_mixed_precision": "amp", "num_workers": "workers", "num_load_workers": "workers"}
FREE = ("model", "loss", "optimizer", "lr_scheduler", "data.datasets", "data.val_datasets")  # a user's file gives them whole
RESULTS = ("points_affine_invariant", "depth_scale_invariant", "depth_affine_invariant", "fov_x")  # of a validation, where there


def hub_file(encoder: str) -> Path:
    """Where torch hub keeps the published weights of a DINOv2 variant."""
    return Path(torch.hub.get_dir()) / "checkpoints" / f"{encoder.replace('_reg', '_reg4')}_pretrain.pth"


def build_model(cfg, stored: dict | None, say) -> MoGe:
    """The network of the config, on the CPU, with the weights of `stored` (a resumed run), of `init`, or a pretrained encoder."""
    model = build(dict(cfg.model), cfg.model_version)
    if cfg.init and not stored:
        stored = read_checkpoint(cfg.init)
    if stored:
        if not isinstance(stored.get("model"), dict):
            raise ValueError(f"{cfg.init or cfg.checkpoint} is no MoGe checkpoint: it should hold model_config and model")
        for line in config.diff(stored.get("model_config", {}), model.config):
            say(f"WARNING: the checkpoint's model differs from the config's: {line}")
        for line in load_weights(model, stored["model"], cfg.init_allow, f"the checkpoint {cfg.init or cfg.checkpoint}"):
            say(f"weights: {line}")
    else:
        name = cfg.model.encoder if model.version == "v1" else cfg.model.encoder.backbone
        file = cfg.backbone_weights or (hub_file(name) if hub_file(name).exists() else None)
        if file:
            dinov2.load_weights(model.encoder_network, file)
            say(f"encoder: {file}")
        elif not cfg.allow_random_backbone:
            remedy = f"--backbone_weights {hub_file(name).name}, --init with a MoGe checkpoint, or --allow_random_backbone true"
            raise ValueError(f"the encoder {name} would start from random weights: give {remedy}")
    wanted = model.intermediate_layers if model.version == "v1" else model.encoder.intermediate_layers
    if not isinstance(wanted, int):  # blocks after the last one read do not run and get no gradient
        model.encoder_network.blocks[max(wanted) + 1 :].requires_grad_(False)
    mode = str(cfg.enable_gradient_checkpointing)
    model.set_gradient_checkpointing({"on": "all", "1": "all", "off": "none", "0": "none"}.get(mode, mode))
    return model


def build_optimizer(model: nn.Module, cfg) -> torch.optim.Optimizer:
    """The config's optimizer over its parameter groups, fused: it skips a step by a flag on the device."""
    if str(cfg.optimizer.get("type")) not in ("AdamW", "Adam", "SGD"):
        raise ValueError(f"optimizer type {cfg.optimizer.get('type')!r}: AdamW, Adam or SGD, which exist in fused form")
    return optimization.build_optimizer(model, {**cfg.optimizer, "fused": True})


def distributed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in DistributedDataParallel where there are several ranks."""
    if dist.world_size() == 1:
        return model
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True)


def tokens_at(step: int, micro: int, low: int, high: int, cfg) -> int:
    """Tokens of a micro-batch, the same on all ranks: the fewest up to `low_resolution_training_steps`, then uniform."""
    if step <= cfg.low_resolution_training_steps:
        return low
    return int(data.rng(cfg.seed, step, micro, 1).integers(low, high + 1))


def build_dataset(cfg, seed: int) -> MoGeDataset:
    """The training instances, a pure function of (seed, key)."""
    normals = any(entry["function"] == "normal_map_loss" for losses in cfg.loss.values() for entry in losses.values())
    return MoGeDataset(cfg.data.datasets, seed=seed, defaults=cfg.data, normals=normals)


def build_loader(dataset: MoGeDataset, cfg, first_step: int, last_step: int):
    """This rank's micro-batches of steps first_step..last_step-1, in order; all images of a micro-batch have one size."""
    rank, world = dist.rank(), dist.world_size()
    batches = (keys for step in range(first_step, last_step) for keys in batch_keys(cfg, step, rank, world))
    return data.loader(data.Guarded(dataset.read), batches, workers=cfg.workers)


def train_step(
    net, model: MoGe, ema: MoGe | None, batches: list[dict], optimizer, scaler, guard: StepGuard, cfg, dtype, step: int, updates: int
) -> dict:
    """One optimizer step; returns detached tensors and the learning rates. Nothing here waits for this step's device work."""
    device, count = guard.device, len(batches)
    optimizer.zero_grad(set_to_none=True)
    total, logs = torch.zeros((), device=device), {}
    for i, batch in enumerate(batches):
        batch = unpack(batch, device)
        tokens = tokens_at(step, i, *model.num_tokens_range, cfg)
        with net.no_sync() if i < count - 1 and net is not model else nullcontext():  # gradients travel with the last micro-batch
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                out = net(batch["image"], tokens)
            loss, terms = total_loss(cfg.loss, out, batch)  # float32
            scaler.scale(loss / count).backward()
        total += loss.detach() / count
        terms |= {"loss": loss.detach()[None], "monitoring.std": out["points"].detach().flatten(1).std(1)}
        for name, value in terms.items():
            logs.setdefault(f"loss/{name}", []).append(value)
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], cfg.grad_clip or math.inf)
    guard.settle()  # the flag of the step before
    rates = optimization.set_lr(optimizer, cfg.lr_scheduler, step - guard.skipped)
    images = cfg.batch_size_forward * count * dist.world_size()
    flag = guard.check(total, grad_norm, f"step {step}, samples {step * images}..{(step + 1) * images - 1}")
    optimizer.found_inf = flag
    optimizer.step()  # fused: does nothing where found_inf is 1
    scaler.update()
    if ema is not None:
        update_ema(list(ema.state_dict().values()), model.state_dict().values(), updates, cfg.ema_decay, skip=flag)
    return {"logs": {name: torch.cat(values) for name, values in logs.items()}, "grad_norm": grad_norm, "rates": rates}


def validate(model: MoGe, cfg, device: torch.device) -> dict[str, float]:
    """{"NAME/METRIC_rel": ...} of every validation set and means over the sets; images are shared out over the ranks."""
    training, scores = model.training, []
    for entry in cfg.data.val_datasets:
        samples = list_samples(entry)[: cfg.validate_images]
        rows = evaluate({"model": predictor(model.eval(), num_tokens=model.num_tokens_range[-1])}, samples, device)
        result = summary(rows, "model")["mean"]
        mean = {f"{name}_{kind}": v for name in RESULTS if name in result for kind, v in result[name].items()}
        scores.append((entry.get("name") or Path(entry["path"]).name, mean))
    model.train(training)
    names = {name for _, mean in scores for name in mean}
    shared = {name: [mean[name] for _, mean in scores if name in mean] for name in names}
    out = {f"{dataset}/{name}": v for dataset, mean in scores for name, v in mean.items()} if len(scores) > 1 else {}
    return out | {name: sum(values) / len(values) for name, values in sorted(shared.items())}


def describe(cfg, dataset, model, dtype, device, step: int, last_step: int) -> str:
    """What the run is about to do, in a line."""
    world, parts = dist.world_size(), cfg.gradient_accumulation_steps
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (
        f"MoGe {model.version}, {len(dataset)} images; {cfg.batch_size_forward} a rank x {parts} micro-batches x {world} ranks = "
        f"{cfg.batch_size_forward * parts * world} images a step, steps {step}..{last_step} of {cfg.num_iterations}; "
        f"{trained / 1e6:.2f} M parameters trained on {device}, amp {str(dtype).removeprefix('torch.')}, "
        f"{'with' if cfg.enable_ema else 'without'} EMA"
    )


def main() -> None:
    cfg = config.parse(sys.argv[1:], __doc__, REFERENCE, aliases=ALIASES, free=FREE)
    for key in ("batch_size_forward", "gradient_accumulation_steps"):
        if cfg[key] < 1:
            raise ValueError(f"{key} is {cfg[key]}: a step needs at least 1")
    device = dist.init(cfg.timeout)
    stop, world, folder = dist.StopSignal(), dist.world_size(), Path(cfg.workspace)
    log = Logger(folder, cfg)
    if cfg.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)  # names what has no such form
    torch.backends.cudnn.benchmark = not cfg.deterministic and len(cfg.data.image_sizes or ()) == 1  # not when sizes vary
    torch.manual_seed(cfg.seed)  # initial weights: the same on all ranks

    check_table(cfg.loss)
    dataset = build_dataset(cfg, cfg.seed)
    for entry in cfg.data.val_datasets:
        list_samples(entry)  # missing: an error now, not at the first validation
    last_step = min(cfg.num_iterations, cfg.max_steps or cfg.num_iterations)
    checkpoints = Checkpoints(folder / "checkpoint", cfg.keep_last, cfg.keep_every, log.text)
    state = checkpoints.load(cfg.checkpoint)
    model = build_model(cfg, state and state[""], log.text).to(device)
    check_table(cfg.loss, dataset.label_types, model.outputs)
    ema = copy.deepcopy(model).requires_grad_(False).eval() if cfg.enable_ema else None
    if ema is not None and state and "ema" in state:
        ema.load_state_dict(state["ema"]["model"])
    optimizer = build_optimizer(model, cfg)
    optimization.check_schedule(cfg.lr_scheduler, len(optimizer.param_groups))
    optimization.set_lr(optimizer, cfg.lr_scheduler, 0)  # notes the base rates
    dtype = dist.autocast_dtype(cfg.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, skipped, updates, averages = 0, 0, 0, Averages()
    if state and "optimizer" in state:
        run = state["optimizer"]
        step, skipped, updates = state["step"], run.get("skipped", 0), run.get("ema_updates", state["step"])
        apply_optimizer(optimizer, scaler, run)
        averages.load(run.get("window", []), device)
        log.text(f"resumed at step {step}")
    elif state:
        log.text(f"{cfg.checkpoint}: weights only, starting at step 0")
    del state
    if cfg.enable_mlflow:
        log.text(f"logging to TensorBoard ({folder / 'tb'}) and {folder / 'metrics.jsonl'}")
    log.text(describe(cfg, dataset, model, dtype, device, step, last_step))

    vis = []
    if cfg.vis_every and dist.is_main():  # instances of a stream of their own
        shown = data.Guarded(build_dataset(cfg, cfg.seed + 1).read)
        size = lambda number: batch_size(cfg.seed + 1, number, cfg.data, cfg.data.datasets)
        vis = [shown[(number, *size(number))] for number in range(cfg.num_vis_images)]
        draw_truth(vis, folder / "vis" / "gt")
    if cfg.compile:
        model.compile_blocks()
    guard = StepGuard(model, cfg.max_bad_steps, skipped, log.text)
    if cfg.skip_zero_lr_backward:
        optimization.set_trained(optimizer, cfg.lr_scheduler, step - skipped)
    net = distributed(model, device)
    bad = data.BadSamples(cfg.max_bad_fraction, log.warn)
    batches = build_loader(dataset, cfg, step, last_step)
    progress = Progress(last_step, step, log)
    images = cfg.batch_size_forward * cfg.gradient_accumulation_steps * world
    model.train()
    while step < last_step:
        dist.at(step, "data")
        tick = time.perf_counter()
        micro = [next(batches) for _ in range(cfg.gradient_accumulation_steps)]
        progress.waited(time.perf_counter() - tick)
        for batch in micro:
            bad.add(batch["bad"], cfg.batch_size_forward)
        if cfg.skip_zero_lr_backward and optimization.set_trained(optimizer, cfg.lr_scheduler, step - guard.skipped):
            net = distributed(model, device)  # another set of gradients travels
        dist.at(step, "train step")
        dist.seed_step(cfg.seed, step, dist.rank())
        out = train_step(net, model, ema, micro, optimizer, scaler, guard, cfg, dtype, step, updates)
        averages.add(out["logs"])
        step, updates = step + 1, updates + 1

        if due(step, cfg.log_every) or step == last_step:
            dist.check_drift(model.parameters(), step)
            values = averages.take()
            run = {"train/grad_norm": out["grad_norm"], "train/skipped": guard.skipped, "train/bad_samples": bad.total()}
            run |= {f"train/lr_{i}" if i else "train/lr": rate for i, rate in enumerate(out["rates"])}
            log.scalars(step, values | run | progress.update(step, values.get("loss/loss", math.nan), out["rates"][0], images))
        if vis and (due(step, cfg.vis_every) or step == 1):
            draw_samples((ema or model).eval(), vis, log, step)
            model.train()
        if cfg.data.val_datasets and (due(step, cfg.validate_every) or step == last_step):
            dist.at(step, "validate")
            scores = validate(ema or model, cfg, device)
            log.scalars(step, {f"val/{name}": value for name, value in scores.items()})
            told = {name: scores.get(f"{name}_rel", float("nan")) for name in RESULTS[:2]}
            log.text(f"step {step}: " + "  ".join(f"{name} {100 * value:.2f} %" for name, value in told.items()))
        stopping = stop.agreed()
        if due(step, cfg.save_every) or step == last_step or stopping:
            dist.at(step, "save")
            guard.settle()
            dist.check_drift(model.parameters(), step)
            window = averages.state()
            if dist.is_main():
                about = {"model_config": model.config}
                run = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "skipped": guard.skipped, "step": step}
                run["window"] = window
                run |= {"ema_updates": updates, "lr_scheduler": cfg.lr_scheduler, **about}
                parts = {"": {"model": model.state_dict(), **about}, "optimizer": run}
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
