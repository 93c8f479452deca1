"""Train multi-view cross-domain diffusion: six views of colour and normals from one picture.

  one process    python mvdiff/train.py --config mvdiff/configs/tiny.yaml
  eight GPUs     torchrun --nproc_per_node 8 mvdiff/train.py --config mvdiff/configs/image.yaml --train_data_dir data/mvdiff --init WEIGHTS
                 torchrun --nproc_per_node 8 mvdiff/train.py --config mvdiff/configs/joint.yaml --train_data_dir data/mvdiff
  two machines   torchrun --nnodes 2 --node_rank RANK --master_addr HOST --nproc_per_node 8 mvdiff/train.py --config ...
  resume         the same command again
"""

import math
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root instead of mvdiff/

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import data, dist
from common.checkpoint import Checkpoints, apply_optimizer, apply_weights
from common.guard import StepGuard
from common.log import Logger, Progress, due
from mvdiff import build, loss as losses, optim
from mvdiff.build import Frozen
from mvdiff.cache import CachedDataset, cache_key
from mvdiff.dataset import MultiViewDataset, camera_embedding, finish
from mvdiff.model import frozen_work, load_unet, predict, save_unet, target_rows, unet_arguments
from mvdiff.unet import UNet
from mvdiff.validation import input_pictures, validate

QUARTERS = 4  # of the time steps, for which the loss is logged apart
TALLY = ("loss", "color", "normal", *(f"t{q}" for q in range(QUARTERS)))  # loss/*: sums, then counts


def build_model(cfg, frozen: Frozen, stored: dict | None, say) -> tuple[UNet, dict]:
    """The UNet of the config and its own config, on the CPU: as `stored` in a checkpoint, from a weights folder, or random."""
    if stored is not None:
        wanted, config = build.unet_changes(cfg, frozen.latent_channels), stored["config"]
        differ = [f"{key} {config.get(key)} -> {value}" for key, value in wanted.items() if (config.get(key) or 0) != (value or 0)]
        if differ:
            raise ValueError(f"the checkpoint's UNet is another one ({', '.join(differ)}): choose another workspace")
        unet = UNet(**unet_arguments(config))
        apply_weights(unet, stored["model"])
        return unet, config
    config = build.unet_config(cfg, frozen.latent_channels)
    if cfg.unet_from_scratch:
        return UNet(**unet_arguments(config)), config
    root, zero = cfg.pretrained_weight_path_unet or cfg.init, cfg.unet_from_pretrained_kwargs.zero_init_conv_in
    return load_unet(root, config, variant=cfg.variant, training=True, zero_init_conv_in=zero, say=say)


def build_optimizer(trained: dict[str, nn.Parameter], cfg) -> torch.optim.AdamW:
    """AdamW over what trains; the camera and domain embedding has a rate of its own."""
    objects = cfg.train_batch_size * cfg.gradient_accumulation_steps * dist.world_size()
    lr = cfg.learning_rate * (objects if cfg.scale_lr else 1)
    groups = optim.parameter_groups(trained, lr, cfg.camera_embedding_lr_mult)
    betas, decay = (cfg.adam_beta1, cfg.adam_beta2), cfg.adam_weight_decay
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=cfg.adam_epsilon, weight_decay=decay, fused=True)


def build_loader(dataset, cfg, first_step: int, last_step: int):
    """This rank's micro-batches of steps first_step..last_step-1, in order."""
    rank, world, parts = dist.rank(), dist.world_size(), cfg.gradient_accumulation_steps
    objects = cfg.train_batch_size * parts * world  # a step
    batches = (micro for step in range(first_step, last_step) for micro in data.positions(step, objects, rank, world, parts))
    return data.loader(data.Guarded(dataset.read), batches, workers=cfg.workers)


def encode(frozen: Frozen, batch: dict, cfg, options: dict) -> dict[str, Tensor]:
    """What the step needs of a batch on its device: frozen work (see model.frozen_work; from the cache where the batch has it),
    camera (N,10) and is_normal (B,D)."""
    if "mean" in batch:
        work = {key: batch[key] for key in ("condition_mean", "condition_std", "embedding")}
        work |= {key: target_rows(batch[key]) for key in ("mean", "std")}
        camera = camera_embedding(batch["angles"], batch["is_normal"], options["camera_flags"])
        return {**work, "camera": target_rows(camera), "is_normal": batch["is_normal"].bool()}
    batch = finish(batch, **options)
    chunk = cfg.vae_chunk or (32 if batch["target"].is_cuda else 2)
    targets = target_rows(batch["target_vae"])
    work = frozen_work(frozen.vae, frozen.clip, targets, batch["image_cond_vae"], batch["image_cond_CLIP"], chunk)
    return {**work, "camera": target_rows(batch["camera_embed"]), "is_normal": batch["is_normal"]}


def make_generators(seed: int, positions: Tensor, device: torch.device) -> list[torch.Generator]:
    """One for each object of a batch, a function of (seed, position); apart from the streams of the data set's attempts."""
    seeds = [int(data.rng(seed, position, 0, 1).integers(2**63)) for position in positions.tolist()]
    return [torch.Generator(device).manual_seed(number) for number in seeds]


def draw(work: dict[str, Tensor], generators: list[torch.Generator], cfg, timesteps: int) -> dict[str, Tensor]:
    """What `denoise` takes at random, in a fixed order: normal numbers for the posteriors of the targets and of the input picture,
    for the noise, its offset and the perturbation; time steps t (N,) below `timesteps`; uniform numbers that say what drops."""
    d, v, shape = work["is_normal"].shape[1], cfg.num_views, work["std"].shape[1:]
    normal = lambda *shape: losses.draw_rows(torch.randn, generators, d, v, *shape)
    draws = {"target": normal(*shape)}  # (N,4,h,w)
    if cfg.cond_latent == "sample":
        draws["condition"] = losses.draw_rows(torch.randn, generators, 1, 1, *shape)  # (B,4,h,w)
    draws["noise"] = normal(*shape)
    if cfg.noise_offset:
        draws["offset"] = normal(shape[0], 1, 1)
    draws["t"] = losses.draw_timesteps(timesteps, cfg.timestep_sharing, generators, d, v)
    if cfg.use_classifier_free_guidance:
        draws["drop"] = losses.draw_units(torch.rand, generators, losses.DROP_UNITS[cfg.drop_type], d, v)
    if cfg.input_perturbation:
        draws["perturbation"] = normal(*shape)
    return draws


def denoise(
    net, frozen: Frozen, work: dict[str, Tensor], draws: dict[str, Tensor], cfg, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(loss, squared error of each row (N,)) of one prediction, with the random numbers of `draw`."""
    (b, d), v, scale, t = work["is_normal"].shape, cfg.num_views, frozen.vae.scaling_factor, draws["t"]
    latents = (work["mean"] + work["std"] * draws["target"]) * scale  # (N,4,h,w)
    latent = work["condition_mean"]
    if cfg.cond_latent == "sample":
        latent = latent + work["condition_std"] * draws["condition"]
    latent = latent * (scale if cfg.scale_input_latents else 1.0)
    noise, keep = draws["noise"], []
    if cfg.noise_offset:
        noise = losses.offset_noise(noise, cfg.noise_offset, draws["offset"])
    if cfg.use_classifier_free_guidance:
        kept = losses.keep_conditions(draws["drop"], cfg.condition_drop_rate, cfg.drop_rule)
        keep = [losses.spread(k, losses.DROP_UNITS[cfg.drop_type], d, b, v) for k in kept]
    added = noise
    if cfg.input_perturbation:
        added = losses.perturb_input(noise, cfg.input_perturbation, draws["perturbation"])
    x = frozen.diffusion.add_noise(latents, added, t)
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        prediction = predict(net, x, t, latent, work["embedding"], work["camera"], v, *keep)
    return losses.denoising_loss(prediction, latents, noise, t, frozen.diffusion, cfg.snr_gamma, cfg.snr_rule)


def tally_rows(rows: Tensor, t: Tensor, is_normal: Tensor, views: int, total_t: int) -> Tensor:
    """(2,6): sums and counts of the rows' squared errors, of colours, of normals, and of each quarter of the time steps."""
    normal = is_normal.T[:, :, None].expand(-1, -1, views).reshape(-1)  # (B,D) -> (D*B*V,)
    quarter = t * QUARTERS // total_t
    groups = torch.stack([~normal, normal, *(quarter == q for q in range(QUARTERS))]).float()  # (6,N)
    return torch.stack([groups @ rows, groups.sum(1)])


def train_step(
    net, trained: dict, shadows: list[Tensor], batches: list[dict], frozen: Frozen, optimizer, scaler, guard: StepGuard, cfg,
    options: dict, dtype, step: int, total_steps: int,
) -> dict:  # fmt: skip
    """One optimizer step over the micro-batches; returns detached tensors. Nothing here waits for this step's device work."""
    device, count, parameters = guard.device, len(batches), list(trained.values())
    optimizer.zero_grad(set_to_none=True)
    mean, tally = 0.0, 0.0
    for i, batch in enumerate(batches):
        generators = make_generators(cfg.seed, batch["position"], device)
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items() if isinstance(value, Tensor)}
        work = encode(frozen, batch, cfg, options)
        alone = i < count - 1 and isinstance(net, DistributedDataParallel)  # gradients travel with the last micro-batch
        draws = draw(work, generators, cfg, frozen.diffusion.num_train_timesteps)
        with net.no_sync() if alone else nullcontext():
            value, rows = denoise(net, frozen, work, draws, cfg, dtype)
            scaler.scale(value / count).backward()
        mean = mean + value.detach() / count
        tally = tally + tally_rows(rows, draws["t"], work["is_normal"], cfg.num_views, frozen.diffusion.num_train_timesteps)
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm or math.inf)
    guard.settle()  # the flag of the step before
    done = step - guard.skipped
    factor = optim.lr_factor(cfg.lr_scheduler, done, cfg.lr_warmup_steps, total_steps, optimizer.defaults["lr"])
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    objects = cfg.train_batch_size * count * dist.world_size()
    flag = guard.check(mean, grad_norm, f"step {step}, samples {step * objects}..{(step + 1) * objects - 1}")
    optimizer.found_inf = flag
    optimizer.step()  # fused: does nothing where found_inf is 1
    scaler.update()
    decay = optim.ema_decay(done + 1, cfg.ema_decay)
    if shadows:
        optim.ema_update(shadows, parameters, decay, skip=flag)
    good = torch.cat([torch.stack([mean, torch.ones_like(mean)])[:, None], tally], dim=1)  # (2,7), in the order of TALLY
    good = torch.where(flag > 0, torch.zeros_like(good), good)
    return {"tally": good, "grad_norm": grad_norm, "lr": [group["lr"] for group in optimizer.param_groups], "ema_decay": decay}


def tally_means(tally: Tensor) -> dict[str, float]:
    """loss/* over all ranks and the steps since the last log line; of groups that occurred."""
    sums = dist.all_sum({f"{name}/{kind}": tally[kind, i] for i, name in enumerate(TALLY) for kind in range(2)})
    return {f"loss/{name}": sums[f"{name}/0"] / sums[f"{name}/1"] for name in TALLY if sums[f"{name}/1"]}


@contextmanager
def averaged(trained: dict[str, nn.Parameter], shadows: list[Tensor]):
    """Within it the network has the moving averages for weights; they change places, so nothing is copied."""

    def swap() -> None:
        for parameter, shadow in zip(trained.values(), shadows):
            parameter.data, shadow.data = shadow.data, parameter.data

    swap()
    try:
        yield
    finally:
        swap()


def export(folder: Path, unet: UNet, config: dict, trained: dict, shadows: list[Tensor]) -> str | None:
    """Write the UNet, with averaged weights where there are any, into the pipeline folder. Returns what went wrong, if anything:
    a full disk must not end the training."""
    try:
        with averaged(trained, shadows):
            save_unet(folder, unet, config)
    except OSError as error:
        return f"{folder} was NOT written: {error}; the checkpoint holds the weights, the same command writes it"


def restore(state: dict | None, optimizer, scaler, trained: dict, shadows: list[Tensor], say) -> tuple[int, int, Tensor]:
    """Load what the checkpoint holds beside the weights; returns (step, steps skipped so far, tally since the last log line)."""
    tally = torch.zeros(2, len(TALLY), device=next(iter(trained.values())).device)
    if not state or "optimizer" not in state:
        if state:
            say("weights only, starting at step 0")
        return 0, 0, tally
    run = state["optimizer"]
    if run["trained"] != list(trained):
        raise ValueError("the checkpoint trained other parameters (trainable_modules): choose another workspace")
    apply_optimizer(optimizer, scaler, run)
    if shadows and "ema" in state:
        torch._foreach_copy_(shadows, [state["ema"]["shadows"][name].to(s.device) for name, s in zip(trained, shadows)])
    elif shadows:
        say("the checkpoint has no moving average: it starts from the weights")
    say(f"resumed at step {state['step']}")
    window = torch.tensor(run["window"])
    if len(window) == dist.world_size():
        tally += window[dist.rank()].to(tally)
    elif dist.is_main():  # another number of ranks: one takes it all
        tally += window.sum(0).to(tally)
    return state["step"], run["skipped"], tally


def build_data(cfg, frozen: Frozen, options: dict, dtype: torch.dtype | None):
    """(training objects, {tag: objects to sample}). `frozen` must still be as it was read: the cache goes by its hash."""
    clip_size = frozen.clip.image_size
    if cfg.debug:
        return build.build_dataset(cfg, [], clip_size), {}
    names, held_out = build.object_names(cfg)
    dataset = build.build_dataset(cfg, names, clip_size, CachedDataset if cfg.latent_cache_dir else MultiViewDataset)
    if cfg.latent_cache_dir:
        dataset.open(cfg.latent_cache_dir, cache_key(frozen, dataset, options, dtype))
    sets = {}
    if held_out:
        sets["val"] = build.build_evaluation(cfg, cfg.validation_data_dir or cfg.train_data_dir, held_out, clip_size)
    if cfg.validation_train_samples:
        sets["val_train"] = build.build_evaluation(cfg, cfg.train_data_dir, names[: cfg.validation_train_samples], clip_size)
    return dataset, sets


def describe(cfg, objects: int, unet: UNet, trained: dict, dtype, device, step: int, last_step: int, total_steps: int) -> str:
    """What the run is about to do: sizes of a batch, steps, what trains."""
    world, parts, batch = dist.world_size(), cfg.gradient_accumulation_steps, cfg.train_batch_size
    domains = 2 if cfg.pred_type == "joint" else 1
    count = lambda parameters: f"{sum(p.numel() for p in parameters) / 1e6:.2f} M"
    return (
        f"{objects} objects; effective batch {cfg.num_views} views x {domains} domains x {batch} objects = "
        f"{cfg.num_views * domains * batch} rows a rank and micro-batch; x {parts} micro-batches x {world} ranks = "
        f"{batch * parts * world} objects a step, steps {step}..{last_step} of {total_steps}; {count(unet.parameters())} parameters, "
        f"{count(trained.values())} trained, on {device}, amp {str(dtype).removeprefix('torch.')}, "
        f"{'with' if cfg.use_ema else 'without'} EMA, {'cached' if cfg.latent_cache_dir and not cfg.debug else 'live'} encoders"
    )


def main() -> None:
    cfg = build.parse(sys.argv[1:], __doc__)
    device = dist.init(cfg.timeout)
    stop, world, folder = dist.StopSignal(), dist.world_size(), Path(cfg.workspace)
    log = Logger(folder, cfg)
    if cfg.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)  # names what has no such form
    torch.backends.cudnn.benchmark = not cfg.deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.allow_tf32
    torch.manual_seed(cfg.seed)  # initial weights: the same on all ranks
    if ignored := build.unused(cfg):
        log.text(f"without effect here: {', '.join(ignored)}")

    dtype = dist.autocast_dtype(cfg.amp, device)
    frozen = build.load_frozen_of(cfg)
    build.check_sizes(frozen, cfg.resolution, cfg.validation_steps_ddim)
    options = build.finish_options(cfg)
    dataset, sets = build_data(cfg, frozen, options, dtype)
    inputs = input_pictures(cfg)
    checkpoints = Checkpoints(folder / "checkpoint", cfg.keep_last, cfg.keep_every, log.text)
    state = checkpoints.load(cfg.checkpoint)
    unet, config = build_model(cfg, frozen, state and state[""], log.text)
    config |= {"sample_size": cfg.resolution // frozen.factor, "scale_input_latents": cfg.scale_input_latents}  # for the samplers
    unet.to(device).set_checkpointing(cfg.gradient_checkpointing)
    if dist.is_main():
        build.write_frozen(folder / "pipeline", frozen)  # before it is cast
    frozen.to(device, dtype)
    trained = optim.select_trainable(unet, cfg.trainable_modules)
    optimizer = build_optimizer(trained, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    shadows = [p.detach().clone() for p in trained.values()] if cfg.use_ema else []
    step, skipped, tally = restore(state, optimizer, scaler, trained, shadows, log.text)
    del state
    objects = cfg.train_batch_size * cfg.gradient_accumulation_steps * world
    total_steps = cfg.max_train_steps or cfg.num_train_epochs * -(-len(dataset) // objects)
    last_step = min(total_steps, cfg.max_steps or total_steps)
    log.text(describe(cfg, len(dataset), unet, trained, dtype, device, step, last_step, total_steps))

    net = torch.compile(unet) if cfg.compile else unet
    if world > 1:
        net = DistributedDataParallel(net, [device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    guard = StepGuard(unet, cfg.max_bad_steps, skipped, log.text)
    bad = data.BadSamples(cfg.max_bad_fraction, log.warn)
    batches = build_loader(dataset, cfg, step, last_step)
    progress = Progress(last_step, step, log)
    look = (sets, inputs, cfg, {"camera_flags": options["camera_flags"]}, device, dtype, log)  # as in eval.py, whatever trains
    if cfg.validation_sanity_check and step == 0:
        with averaged(trained, shadows):
            validate(unet, frozen, *look, step, score=True, draw=True)
    unet.train()
    while step < last_step:
        dist.at(step, "data")
        tick = time.perf_counter()
        micro = [next(batches) for _ in range(cfg.gradient_accumulation_steps)]
        progress.waited(time.perf_counter() - tick)
        for batch in micro:
            bad.add(batch["bad"], cfg.train_batch_size)
        dist.at(step, "train step")
        dist.seed_step(cfg.seed, step, dist.rank())
        out = train_step(
            net, trained, shadows, micro, frozen, optimizer, scaler, guard, cfg, options, dtype, step, total_steps
        )
        step, tally = step + 1, tally + out["tally"]

        if due(step, cfg.log_every) or step == last_step:
            dist.check_drift(trained.values(), step)
            values = tally_means(tally)
            run = {"train/grad_norm": out["grad_norm"], "train/skipped": guard.skipped, "train/bad_samples": bad.total()}
            run |= {"train/ema_decay": out["ema_decay"], **dict(zip(("train/lr", "train/lr_camera_embedding"), out["lr"]))}
            log.scalars(step, values | run | progress.update(step, values.get("loss/loss", float("nan")), out["lr"][0], objects))
            tally = torch.zeros_like(tally)
        score, show = (due(step, every) or (every and step == last_step) for every in (cfg.validate_every, cfg.vis_every))
        if (score or show) and (sets or inputs):
            dist.at(step, "validate")
            with averaged(trained, shadows):
                validate(unet, frozen, *look, step, score, show)
        stopping = stop.agreed()
        if due(step, cfg.save_every) or step == last_step or stopping:
            dist.at(step, "save")
            guard.settle()
            dist.check_drift(trained.values(), step)
            window = dist.gather(tally.tolist())  # every rank's part of the next log line
            if dist.is_main():
                run = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "skipped": guard.skipped, "window": window}
                parts = {"": {"model": unet.state_dict(), "config": config}, "optimizer": run | {"trained": list(trained)}}
                checkpoints.save(step, parts | ({"ema": {"shadows": dict(zip(trained, shadows))}} if shadows else {}))
        if stopping:
            log.text(f"stop signal: saved at step {step}; the same command goes on from here")
            break
    progress.close()
    failed = checkpoints.wait()
    if dist.is_main():
        failed = export(folder / "pipeline", unet, config, trained, shadows) or failed
    log.close()
    net = None  # DDP goes before its process group
    dist.shutdown()
    if failed:
        sys.exit(failed)


if __name__ == "__main__":
    main()
