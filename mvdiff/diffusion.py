"""Noise schedule of training (DDPM, arXiv 2006.11239) and deterministic or stochastic sampling (DDIM, arXiv 2010.02502)."""

import math

import numpy as np
import torch
from torch import Tensor


def make_betas(num_train_timesteps: int, beta_start: float, beta_end: float, beta_schedule: str) -> Tensor:
    """(T,) fp32: "linear", or "scaled_linear" = linear in the square root."""
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32)
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2
    raise ValueError(f"beta_schedule {beta_schedule!r}: known are linear and scaled_linear")


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas (T,) rescaled so that the last step is pure noise (arXiv 2305.08891, algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    cumprod = root**2
    return 1 - torch.cat([cumprod[:1], cumprod[1:] / cumprod[:-1]])


class Diffusion:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise. The arguments bear the names of a scheduler_config.json.

    `prediction_type`: what the network predicts: "epsilon" (the noise), "v_prediction" (sqrt(a) noise - sqrt(1-a) x_0) or
    "sample" (x_0).
    `alphas_cumprod` (T,) is fp32 and stays so: in half precision 1 - a would be wrong by 15 % at the first steps.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        steps_offset: int = 1,
        set_alpha_to_one: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
    ):
        if prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type {prediction_type!r}: known are epsilon, v_prediction and sample")
        if timestep_spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f"timestep_spacing {timestep_spacing!r}: known are leading, trailing and linspace")
        betas = make_betas(num_train_timesteps, beta_start, beta_end, beta_schedule)
        if trained_betas is not None:
            betas = torch.tensor(trained_betas, dtype=torch.float32)
        if rescale_betas_zero_snr:
            betas = zero_terminal_snr(betas)
        self.betas, self.alphas_cumprod = betas, (1 - betas).cumprod(0)
        self.num_train_timesteps = len(betas)
        self.prediction_type, self.timestep_spacing, self.steps_offset = prediction_type, timestep_spacing, steps_offset
        self.clip = clip_sample_range if clip_sample else None
        self._alphas = self.alphas_cumprod.numpy()  # for sampling: its coefficients need no device
        self._last_alpha = np.float32(1) if set_alpha_to_one else self._alphas[0]

    def to(self, device: torch.device | str) -> "Diffusion":
        """Move the schedule, so that training gathers from it without a copy per step."""
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        return self

    # ---- training --------------------------------------------------------------------------------------------------

    def roots(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t), (N,1,1,1) fp32, for t (N,) int64."""
        a = self.alphas_cumprod[t][:, None, None, None]
        return a.sqrt(), (1 - a).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of x0 (N,4,h,w) with noise of the same shape at t (N,); fp32."""
        signal, sigma = self.roots(t)
        return signal * x0.float() + sigma * noise.float()

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The target of v-prediction (arXiv 2202.00512), fp32."""
        signal, sigma = self.roots(t)
        return signal * noise.float() - sigma * x0.float()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict, according to `prediction_type`; fp32."""
        if self.prediction_type == "v_prediction":
            return self.velocity(x0, noise, t)
        return noise.float() if self.prediction_type == "epsilon" else x0.float()

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio a / (1 - a) at t (N,), fp32; 0 at the last step of a schedule with zero terminal SNR."""
        a = self.alphas_cumprod[t]
        return a / (1 - a)

    # ---- sampling --------------------------------------------------------------------------------------------------

    def timesteps(self, steps: int) -> list[int]:
        """The time steps of a sampler of `steps` steps, descending."""
        total = self.num_train_timesteps
        if not 1 <= steps <= total:
            raise ValueError(f"{steps} sampling steps: must be between 1 and {total}")
        if self.timestep_spacing == "leading":
            out = [i * (total // steps) + self.steps_offset for i in reversed(range(steps))]
        elif self.timestep_spacing == "trailing":
            out = [int(np.round(total - i * total / steps)) - 1 for i in range(steps)]
        else:
            out = [int(i) for i in np.linspace(0, total - 1, steps).round()[::-1]]
        if out[0] >= total:
            raise ValueError(f"{steps} steps with offset {self.steps_offset} start beyond {total - 1}: use fewer steps")
        return out

    def step(self, output: Tensor, t: int, x: Tensor, steps: int, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
        """One DDIM step from x_t to the step before it, in fp32: equation 12 with sigma of equation 16 times `eta`.

        The step before t is t - T // steps in every spacing (for "trailing" and "linspace" it may differ from the next entry
        of `timesteps`: so the published sampler). If samples are clipped, the noise is not recomputed from the clipped one.
        """
        output, x = output.float(), x.float()
        before = t - self.num_train_timesteps // steps
        # numpy fp32 numbers: differences of near equals, as in std, come out as in an fp32 sampler
        a, a_before, one = self._alphas[t], self._alphas[before] if before >= 0 else self._last_alpha, np.float32(1)
        signal, sigma = math.sqrt(a), math.sqrt(one - a)
        if self.prediction_type == "v_prediction":
            x0, epsilon = signal * x - sigma * output, signal * output + sigma * x
        elif self.prediction_type == "epsilon":
            if a == 0:
                raise ValueError("zero terminal SNR cannot be sampled with prediction_type epsilon: nothing of the image is left")
            x0, epsilon = (x - sigma * output) / signal, output
        else:
            x0, epsilon = output, (x - signal * output) / sigma
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        std = eta * math.sqrt((one - a_before) / (one - a) * (one - a / a_before))
        x = math.sqrt(a_before) * x0 + math.sqrt(max(0.0, 1 - a_before - std**2)) * epsilon
        return x + std * noise.float() if std > 0 else x
