"""Training loss: noise, time steps, dropping of the conditions, min-SNR weights, mean squared error.

Rows are ordered (domain, object, view), views fastest: see unet.py. Everything here is fp32.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Published names of what is dropped together -> unit (see `spread`)
DROP_UNITS = {"drop_as_a_whole": "object", "drop_independent": "row", "drop_joint": "pair"}


def spread(values: Tensor, unit: str, domains: int, objects: int, views: int) -> Tensor:
    """One value per unit (n,) -> one per row (domains * objects * views,).

    `unit`: "row": a row alone; "pair": a view of an object, in all domains; "group": an object in one domain, all its views;
    "object": all views and domains.
    """
    shape = (domains if unit in ("row", "group") else 1, objects, views if unit in ("row", "pair") else 1)
    return values.view(shape).expand(domains, objects, views).reshape(-1)


def unit_count(unit: str, domains: int, objects: int, views: int) -> int:
    """How many values `spread` takes."""
    return (domains if unit in ("row", "group") else 1) * objects * (views if unit in ("row", "pair") else 1)


def draw_rows(draw: Callable, generators: Sequence[torch.Generator], domains: int, views: int, *shape: int) -> Tensor:
    """Random rows (domains * objects * views, *shape), each object's from its own generator: whatever else is in the batch, and on
    whatever rank, an object's numbers are the same. `draw`: torch.randn, torch.rand, or another of their form."""
    draws = [draw((domains, views, *shape), generator=g, device=g.device) for g in generators]
    return torch.stack(draws, 1).flatten(0, 2)


def draw_units(draw: Callable, generators: Sequence[torch.Generator], unit: str, domains: int, views: int) -> Tensor:
    """One random number per unit, as `spread` takes them."""
    return draw_rows(draw, generators, unit_count(unit, domains, 1, 1), unit_count(unit, 1, 1, views))


def draw_timesteps(total: int, sharing: str, generators: Sequence[torch.Generator], domains: int, views: int) -> Tensor:
    """Uniform time steps in [0, total), int64, one per row, shared within each `sharing` unit.

    "group" is the published training: the views of an object share t, its two domains do not. "row": every view its own.
    "object": both domains share t, as they do in sampling.
    """
    t = draw_units(lambda *size, **options: torch.randint(total, *size, **options), generators, sharing, domains, views)
    return spread(t, sharing, domains, len(generators), views)


def offset_noise(noise: Tensor, offset: float, per_channel: Tensor) -> Tensor:
    """noise (N,4,h,w) + offset * one normal number per row and channel (N,4,1,1)."""
    return noise + offset * per_channel if offset else noise


def perturb_input(noise: Tensor, strength: float, extra: Tensor) -> Tensor:
    """The noise that is added to the input only, while the target keeps `noise` (arXiv 2301.11706); extra: normal, of its shape."""
    return noise + strength * extra if strength else noise


def keep_conditions(u: Tensor, rate: float, rule: str = "separate") -> tuple[Tensor, Tensor]:
    """Which conditions survive, from uniform numbers u (n,) in [0,1) -> (keep latent, keep embedding), fp32 0/1 of u's shape.

    "separate" (Wonder3D): u < rate drops the embedding, rate <= u < 2 rate both, 2 rate <= u < 3 rate the latent.
    "both": u < rate drops both.
    """
    if rule == "both":
        keep = (u >= rate).float()
        return keep, keep
    if rule != "separate":
        raise ValueError(f"dropout rule {rule!r}: known are separate and both")
    return 1 - ((u >= rate) & (u < 3 * rate)).float(), (u >= 2 * rate).float()


def snr_weights(snr: Tensor, gamma: float | None, prediction_type: str = "epsilon", rule: str = "seed") -> Tensor:
    """Min-SNR weights (arXiv 2303.09556) of the rows from their SNR (N,); 1 where gamma is None.

    For epsilon min(snr, gamma) / snr, whose limit 1 stands where snr is 0 (zero terminal SNR). For v-prediction by `rule`:
    "wonder3d" the same; "seed" min(snr + 1, gamma) / (snr + 1); "paper" min(snr, gamma) / (snr + 1).
    """
    if rule not in ("wonder3d", "seed", "paper"):
        raise ValueError(f"snr_rule {rule!r}: known are wonder3d, seed and paper")
    if gamma is None:
        return torch.ones_like(snr)
    if prediction_type == "v_prediction" and rule != "wonder3d":
        numerator = snr + 1 if rule == "seed" else snr
        return numerator.clamp(max=gamma) / (snr + 1)
    return torch.where(snr > 0, snr.clamp(max=gamma) / snr.clamp(min=1e-20), torch.ones_like(snr))


def diffusion_loss(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(mean over rows of weight * squared error, squared error per row (N,) detached), fp32, from (N,4,h,w) tensors."""
    rows = (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))
    return (rows if weights is None else weights * rows).mean(), rows.detach()


def denoising_loss(
    prediction: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    diffusion,
    snr_gamma: float | None = None,
    snr_rule: str = "seed",
) -> tuple[Tensor, Tensor]:
    """Loss, and squared error per row, of a prediction for latents (N,4,h,w) that were noised with `noise` at t (N,).

    `diffusion` (see diffusion.py) gives the target and the signal-to-noise ratio.
    """
    weights = snr_weights(diffusion.snr(t), snr_gamma, diffusion.prediction_type, snr_rule)
    return diffusion_loss(prediction, diffusion.target(latents, noise, t), weights)
