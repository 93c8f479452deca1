"""What the sections `optimizer`, `lr_scheduler` and `loss` of a config mean."""

import difflib
import fnmatch
import math

import torch
from torch import Tensor, nn

from stereo import loss as losses
from stereo.schedule import evaluate, one_cycle
from stereo.weights import NO_EFFECT, OPTIONS

OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
SCHEDULERS = {  # params: those needed, and the others
    "LambdaLR": (["lr_lambda"], []),
    "SequentialLR": (["schedulers", "milestones"], ["sequential_restart"]),
    "StepLR": (["step_size"], ["gamma"]),
    "MultiStepLR": (["milestones"], ["gamma"]),
    "ExponentialLR": (["gamma"], []),
    "ConstantLR": ([], ["factor", "total_iters"]),
    "LinearLR": ([], ["start_factor", "end_factor", "total_iters"]),
    "PolynomialLR": ([], ["total_iters", "power"]),
    "CosineAnnealingLR": (["T_max"], ["eta_min"]),
    "OneCycleLR": (
        ["max_lr", "total_steps"],
        ["pct_start", "div_factor", "final_div_factor", "anneal_strategy", "cycle_momentum"],
    ),
}
PLAIN = ("disparity_l1_loss", "disparity_smooth_l1_loss", "disparity_epe_loss", "gradient_loss")
FUNCTIONS = (*PLAIN, "multi_scale_loss", "foundation_stereo_loss")

# keys of published cfg.yaml files that describe the run they came from, not the network
PUBLISHED = ["mixed_precision", "n_downsample", "corr_implementation", "wdecay", "num_steps", "world_size", "num_worker"]
PUBLISHED += ["img_gamma", "inference_tile", "tile_min_overlap", "tile_wtype", "max_val_sample"]
PUBLISHED += ["val_interval", "time_limit", "notes", "tags_more", "finetune_from", "finetune_ckpt_name", "train_iters", "valid_iters"]


RANGES = (  # lowest, highest, whether null will do, keys
    (1, math.inf, False, "num_iterations batch_size_forward gradient_accumulation_steps train_iters valid_iters max_bad_steps"),
    (0, math.inf, False, "log_every save_every validate_every vis_every num_vis_images workers keep_every data.erase_scale"),
    (0, 1, False, "ema_decay max_bad_fraction data.flip_probability data.vertical_flip_probability data.min_valid"),
    (0, math.inf, True, "grad_clip"),
    (1, math.inf, True, "max_steps max_steps_per_run validate_pairs keep_last data.max_disparity"),
)


def check(cfg: dict) -> None:
    """ValueError naming what is wrong with the config, before anything is built by it."""
    check_ranges(cfg)
    check_model(cfg["model"])
    check_optimizer(cfg["optimizer"])
    section, entries, steps = cfg["lr_scheduler"], len(cfg["optimizer"]["params"]), cfg["num_iterations"]
    check_scheduler(section, entries)
    try:
        for entry in range(entries):
            for step in (0, steps - 1):
                lr_factor(section, step, 1.0, entry, steps=steps)
    except (TypeError, ZeroDivisionError, OverflowError, ValueError) as error:
        raise ValueError(f"lr_scheduler: {error}") from None
    check_loss(cfg["loss"], cfg["train_iters"])


def check_ranges(cfg: dict) -> None:
    """ValueError for a number of the config that is outside its range."""
    for low, high, nullable, names in RANGES:
        for name in names.split():
            value = (cfg["data"] if name.startswith("data.") else cfg)[name.removeprefix("data.")]
            if not (nullable and value is None) and not (isinstance(value, (int, float)) and low <= value <= high):
                raise ValueError(f"{name} {value} must be {f'from {low} to {high}' if high < math.inf else f'{low} or more'}")


def check_keys(where: str, given, known=None) -> None:
    """ValueError where `given` is no section, or has a key that is not one of `known` (None: all are)."""
    if not isinstance(given, dict):
        raise ValueError(f"{where}: {given!r} must be a section of keys")
    for key in given:
        if known is not None and key not in known:
            raise ValueError(f"{where}: unknown key '{key}'; there are {', '.join(known)}")


def check_model(section: dict) -> None:
    """ValueError for a key of `model` that neither the network nor a published cfg.yaml knows."""
    for key in section:
        if key not in (*OPTIONS, *NO_EFFECT, *PUBLISHED):
            near = difflib.get_close_matches(key, OPTIONS, 1, 0)[0]
            raise ValueError(f"unknown key 'model.{key}': did you mean '{near}'?")


def check_optimizer(section: dict) -> None:
    """ValueError naming what is wrong with the config's `optimizer`, {"type", "no_decay_1d", "params": [...]}."""
    check_keys("optimizer", section, ("type", "no_decay_1d", "params"))
    if section.get("type", "AdamW") not in OPTIMIZERS:
        raise ValueError(f"optimizer.type '{section['type']}' must be one of {', '.join(OPTIMIZERS)}")
    if not isinstance(section.get("params"), list):
        raise ValueError('optimizer.params must be a list such as [{params: {include: ["*"]}, lr: 1e-4}]')
    options = OPTIMIZERS[section.get("type", "AdamW")]([torch.zeros(1)]).defaults
    for place, entry in enumerate(section["params"]):
        where = f"optimizer.params.{place}"
        check_keys(where, entry, ("params", *options))
        check_keys(f"{where}.params", entry.get("params") or {}, ("include", "exclude"))
        if not isinstance(entry.get("lr"), (int, float)) or entry["lr"] < 0:
            raise ValueError(f"{where}: lr {entry.get('lr')} must be a number, 0 or more")


def parameter_groups(model: nn.Module, section: dict) -> list[dict]:
    """Groups for torch.optim from `optimizer.params`, a list of {"params": {"include": [glob], "exclude": [glob]}, lr, ...}.

    A trainable parameter goes to the first group that matches its name (`*` crosses dots). With `no_decay_1d` vectors, scalars
    and the attention temperatures of a group get a group of their own without weight decay. Each group notes the place of its
    `entry` in the list. ValueError lists the parameters that match none.
    """
    groups, free = [], [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for place, entry in enumerate(section["params"]):
        rule, options = entry.get("params") or {"include": ["*"]}, {k: v for k, v in entry.items() if k != "params"}
        options["entry"] = place
        hit = lambda name, patterns: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns or ())
        mine = [(n, p) for n, p in free if hit(n, rule.get("include")) and not hit(n, rule.get("exclude"))]
        taken = {n for n, _ in mine}
        free = [(n, p) for n, p in free if n not in taken]
        flat = {n for n, p in mine if section.get("no_decay_1d") and (p.ndim <= 1 or n.endswith("temperature"))}
        if not mine:
            raise ValueError(f"optimizer: no trainable parameter matches {rule.get('include')} without {rule.get('exclude')}")
        if rest := [p for n, p in mine if n not in flat]:
            groups.append({"params": rest, **options})
        if flat:
            groups.append({"params": [p for n, p in mine if n in flat], **options, "weight_decay": 0.0})
    if free:
        raise ValueError(
            f"optimizer: {len(free)} parameters are in no group: {', '.join(n for n, _ in free[:10])}; add them to an include"
        )
    return groups


def make_optimizer(model: nn.Module, section: dict) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD (fused: they skip a step by a flag on the device), each group with its `base_lr` noted."""
    optimizer = OPTIMIZERS[section.get("type", "AdamW")](parameter_groups(model, section), fused=True)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def check_scheduler(section: dict | None, entries: int, where: str = "lr_scheduler") -> None:
    """ValueError naming what is wrong with the config's `lr_scheduler`, given the number of entries of optimizer.params."""
    if not section:
        return
    check_keys(where, section, ("type", "params"))
    kind, params = section.get("type"), section.get("params") or {}
    if kind not in SCHEDULERS:
        raise ValueError(f"{where}.type '{kind}' must be one of {', '.join(SCHEDULERS)}")
    needed, others = SCHEDULERS[kind]
    check_keys(f"{where}.params", params, (*needed, *others))
    if lacking := [key for key in needed if key not in params]:
        raise ValueError(f"{where}: {kind} needs params.{lacking[0]}")
    if params.get("cycle_momentum"):
        raise ValueError(f"{where}: the momentum is not cycled here: set cycle_momentum false")
    if kind == "SequentialLR":
        parts, milestones = params["schedulers"], params["milestones"]
        if len(parts) != len(milestones) + 1:
            raise ValueError(f"{where}: {len(parts)} schedulers need {len(parts) - 1} milestones")
        for place, part in enumerate(parts):
            check_scheduler(part, entries, f"{where}.params.schedulers.{place}")
    elif kind == "LambdaLR" and isinstance(params["lr_lambda"], list) and len(params["lr_lambda"]) != entries:
        raise ValueError(f"{where}: {len(params['lr_lambda'])} expressions for the {entries} entries of optimizer.params")


def lr_factor(
    section: dict | None, step: int, base_lr: float, entry: int = 0, restart: bool = False, steps: float = math.inf
) -> float:
    """Factor on the learning rate of update `step` (from 0), from `lr_scheduler`: {"type": torch's name, "params": {...}}.

    Expressions (LambdaLR) are arithmetic in `epoch`, the number of finished updates, and `steps`, that of all; a list has one per
    entry of optimizer.params. The parts of a SequentialLR see the absolute step; with `restart` (sequential_restart) the steps
    since their own start, as torch counts them. `check_scheduler` tells what is wrong with a section.
    """
    if not section:
        return 1.0
    kind, p = section["type"], section.get("params") or {}
    match kind:
        case "LambdaLR":
            rule = p["lr_lambda"]
            return evaluate(rule[entry] if isinstance(rule, list) else rule, step, steps)
        case "SequentialLR":
            restart, milestones = p.get("sequential_restart", restart), p["milestones"]
            i = sum(step >= m for m in milestones)
            own = step - milestones[i - 1] if restart and i else step
            return lr_factor(p["schedulers"][i], own, base_lr, entry, restart, steps)
        case "StepLR":
            return p.get("gamma", 0.1) ** (step // p["step_size"])
        case "MultiStepLR":
            return p.get("gamma", 0.1) ** sum(step >= m for m in p["milestones"])
        case "ExponentialLR":
            return p["gamma"] ** step
        case "ConstantLR":
            return p.get("factor", 1 / 3) if step < p.get("total_iters", 5) else 1.0
        case "LinearLR":
            start, end, total = p.get("start_factor", 1 / 3), p.get("end_factor", 1.0), p.get("total_iters", 5)
            return start + (end - start) * min(step, total) / total
        case "PolynomialLR":
            total = p.get("total_iters", 5)
            return (1 - min(step, total) / total) ** p.get("power", 1.0)
        case "CosineAnnealingLR":
            low = p.get("eta_min", 0.0) / base_lr
            return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / p["T_max"])))
        case "OneCycleLR":
            return one_cycle(step, **{key: value for key, value in p.items() if key != "cycle_momentum"}) / base_lr
    raise ValueError(f"lr_scheduler.type '{kind}' must be one of {', '.join(SCHEDULERS)}")


def check_loss(table: dict, iters: int) -> None:
    """ValueError naming what is wrong with the config's `loss`: {label type: {name: {"function", "weight", "params"}}}.

    Each term is tried on a small example: a misspelt or ill-typed parameter shows before the run.
    """
    check_keys("loss", table)
    out = {"init": torch.zeros(1, 1, 4, 4), "preds": [torch.zeros(1, 1, 16, 16)] * iters}
    example = out, torch.ones(1, 16, 16), torch.ones(1, 16, 16, dtype=torch.bool), torch.zeros(1)
    for label, terms in table.items():
        check_keys(f"loss.{label}", terms or {})
        for name, term in (terms or {}).items():
            where = f"loss.{label}.{name}"
            check_keys(where, term, ("function", "weight", "params"))
            check_keys(f"{where}.params", term.get("params") or {})
            function = term.get("function")
            if function not in FUNCTIONS:
                raise ValueError(f"{where}: function '{function}' must be one of {', '.join(FUNCTIONS)}")
            weights = (term.get("params") or {}).get("weights")
            count = len(weights) if isinstance(weights, list) else 0
            if function == "multi_scale_loss" and count not in (3, iters):
                raise ValueError(
                    f"{where}: {count} weights; give 3 (1/4, 1/2 and full size of the prediction) or {iters} (train_iters)"
                )
            try:
                total_loss(*example, {label: {name: term}}, 64.0)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{where}: {error}") from None


def needs_all(table: dict) -> bool:
    """True when a loss looks at every iteration, not only at the last."""
    terms = [term for terms in table.values() for term in (terms or {}).values()]
    uses = lambda term: term["function"] == "multi_scale_loss" and len(term["params"]["weights"]) != 3
    return any(term["function"] == "foundation_stereo_loss" or uses(term) for term in terms)


def total_loss(
    out: dict, truth: Tensor, mask: Tensor, label: Tensor, table: dict, max_disparity: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the losses of `table`; each label type's counts by its share of the samples. Runs in float32.

    out: the network's result. truth, mask: (B, H, W). label: (B,) number of each sample's label type in the order of `table`.
    Returns the loss and {name: detached value of each term and of its parts}. A label type without losses ("invalid") gives zero.
    """
    init, preds = out["init"].float(), [pred.float() for pred in out["preds"]]
    final = preds[-1].squeeze(1)
    total, logs = 0.0 * (init.sum() + final.sum()), {}  # every parameter has a gradient, whatever the losses are
    for number, (label_type, terms) in enumerate(table.items()):
        mine = label == number
        own, share = mask & mine.view(-1, 1, 1), mine.float().mean()
        for name, term in (terms or {}).items():
            function, params = term["function"], dict(term.get("params") or {})
            if function == "foundation_stereo_loss":
                value, parts = losses.foundation_stereo_loss(
                    init, preds, truth, own, **({"max_disparity": max_disparity} | params)
                )
            elif function == "multi_scale_loss":
                levels = losses.disparity_pyramid(final) if len(params["weights"]) == 3 else [pred.squeeze(1) for pred in preds]
                value, parts = losses.multi_scale_loss(levels, truth, own, **params)
            else:
                value, parts = getattr(losses, function)(final, truth, own, **params)
            total = total + term.get("weight", 1.0) * share * value
            tag = name if label_type == "stereo" else f"{label_type}.{name}"
            logs |= {tag: value.detach()} | {f"{tag}.{key}": part for key, part in parts.items() if not key.startswith("iter_")}
    return total, logs
