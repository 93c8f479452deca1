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
PLAIN = ("disparity_l1_loss", "disparity_smooth_l1_loss", "disparity_epe_loss", "gradient_loss")
FUNCTIONS = (*PLAIN, "multi_scale_loss", "foundation_stereo_loss")

# keys of published cfg.yaml files that describe the run they came from, not the network
PUBLISHED = ["mixed_precision", "n_downsample", "corr_implementation", "wdecay", "num_steps", "world_size", "num_worker"]
PUBLISHED += ["img_gamma", "inference_tile", "tile_min_overlap", "tile_wtype", "max_val_sample"]
PUBLISHED += ["val_interval", "time_limit", "notes", "tags_more", "finetune_from", "finetune_ckpt_name", "train_iters", "valid_iters"]


def check_model(section: dict) -> None:
    """ValueError for a key of `model` that neither the network nor a published cfg.yaml knows."""
    for key in section:
        if key not in (*OPTIONS, *NO_EFFECT, *PUBLISHED):
            near = difflib.get_close_matches(key, OPTIONS, 1, 0)[0]
            raise ValueError(f"unknown key 'model.{key}': did you mean '{near}'?")


def parameter_groups(model: nn.Module, section: dict) -> list[dict]:
    """Groups for torch.optim from `optimizer.params`, a list of {"params": {"include": [glob], "exclude": [glob]}, lr, ...}.

    A trainable parameter goes to the first group that matches its name (`*` crosses dots). With `no_decay_1d` vectors, scalars
    and the attention temperatures of a group get a group of their own without weight decay. ValueError lists those that match none.
    """
    groups, free = [], [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for entry in section["params"]:
        rule, options = entry.get("params") or {"include": ["*"]}, {k: v for k, v in entry.items() if k != "params"}
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
    if section.get("type", "AdamW") not in OPTIMIZERS:
        raise ValueError(f"optimizer.type '{section['type']}' must be one of {', '.join(OPTIMIZERS)}")
    optimizer = OPTIMIZERS[section.get("type", "AdamW")](parameter_groups(model, section), fused=True)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def lr_factor(section: dict | None, step: int, base_lr: float, group: int = 0, restart: bool = False) -> float:
    """Factor on the learning rate of update `step` (from 0), from `lr_scheduler`: {"type": torch's name, "params": {...}}.

    Expressions (LambdaLR) are arithmetic in `epoch`, the number of finished updates; a list has one per group. The parts of a
    SequentialLR see the absolute step; with `restart` (sequential_restart) the steps since their own start, as torch counts them.
    """
    if not section:
        return 1.0
    kind, p = section["type"], section.get("params") or {}
    match kind:
        case "LambdaLR":
            rule = p["lr_lambda"]
            return evaluate(rule[min(group, len(rule) - 1)] if isinstance(rule, list) else rule, step)
        case "SequentialLR":
            restart, milestones = p.get("sequential_restart", restart), p["milestones"]
            if len(p["schedulers"]) != len(milestones) + 1:
                raise ValueError(f"lr_scheduler: {len(p['schedulers'])} schedulers need {len(p['schedulers']) - 1} milestones")
            i = sum(step >= m for m in milestones)
            return lr_factor(p["schedulers"][i], step - milestones[i - 1] if restart and i else step, base_lr, group, restart)
        case "StepLR":
            return p.get("gamma", 0.1) ** (step // p["step_size"])
        case "MultiStepLR":
            return p.get("gamma", 0.1) ** sum(step >= m for m in p["milestones"])
        case "ExponentialLR":
            return p["gamma"] ** step
        case "CosineAnnealingLR":
            low = p.get("eta_min", 0.0) / base_lr
            return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / p["T_max"])))
        case "OneCycleLR":
            return one_cycle(step, **p) / base_lr
    known = "LambdaLR, SequentialLR, StepLR, MultiStepLR, ExponentialLR, CosineAnnealingLR, OneCycleLR"
    raise ValueError(f"lr_scheduler.type '{kind}' must be one of {known}")


def check_loss(table: dict, iters: int) -> None:
    """ValueError naming what is wrong with the config's `loss`: {label type: {name: {"function", "weight", "params"}}}."""
    for label, terms in table.items():
        for name, term in (terms or {}).items():
            where, function = f"loss.{label}.{name}", term.get("function")
            if function not in FUNCTIONS:
                raise ValueError(f"{where}: function '{function}' must be one of {', '.join(FUNCTIONS)}")
            if unknown := set(term) - {"function", "weight", "params"}:
                raise ValueError(f"{where}: unknown key '{min(unknown)}'; there are function, weight, params")
            count = len((term.get("params") or {}).get("weights", ()))
            if function == "multi_scale_loss" and count not in (3, iters):
                raise ValueError(
                    f"{where}: {count} weights; give 3 (1/4, 1/2 and full size of the prediction) or {iters} (train_iters)"
                )


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
