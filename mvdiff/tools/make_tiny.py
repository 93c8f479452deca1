"""Make mvdiff/tiny, the weights folder that configs/tiny.yaml starts from, without any download.

python -m synth mvdiff data/tiny/vae --scenes 96 --size 64x64 --seed 100
python mvdiff/tools/make_tiny.py --data data/tiny/vae --out mvdiff/tiny --minutes 10

The autoencoder has the published architecture, small. Its encoder is a fixed linear map, written into the weights: means of 4 x 4
pixels, and of each 2 x 2 of these the four Haar coefficients, so 12 channels at an eighth of the side. Its decoder starts by
passing the mean colours through, and is trained to invert the map on rendered objects on white. The image encoder is random. The
UNet has no weights here: it starts from scratch.
"""

import argparse
import math
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the repository root instead of mvdiff/tools/

import torch
import torch.nn.functional as F

from common.data import stack
from mvdiff.clip import CLIPVision
from mvdiff.dataset import MultiViewDataset, finish, list_objects
from mvdiff.metrics import psnr
from mvdiff.model import clip_arguments, vae_arguments
from mvdiff.vae import AutoencoderKL
from mvdiff.weights import write_json, write_part

VAE = {
    "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 12, "act_fn": "silu",
    "block_out_channels": [8, 16, 32, 32], "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 64,
}  # fmt: skip
CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
    "projection_dim": 32, "hidden_act": "quick_gelu",
}  # fmt: skip
UNET = {
    "_class_name": "UNetMV2DConditionModel", "sample_size": 8, "in_channels": 24, "out_channels": 12, "layers_per_block": 1,
    "block_out_channels": [48, 96, 96], "attention_head_dim": 4, "cross_attention_dim": 32, "norm_num_groups": 8,
    "down_block_types": ["CrossAttnDownBlockMV2D", "CrossAttnDownBlockMV2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlockMV2D", "CrossAttnUpBlockMV2D"],
    "mid_block_type": "UNetMidBlockMV2DCrossAttn", "class_embed_type": "projection", "projection_class_embeddings_input_dim": 10,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, "prediction_type": "epsilon",
}  # fmt: skip
CARRIER = 30.0  # a constant beside the signals of a norm's group: the norm then divides by a constant
DETAIL = 2.0  # weight of the three differences against the mean


@torch.no_grad()
def write_linear_encoder(vae: AutoencoderKL) -> None:
    """Set the encoder's weights to the linear map of the module's docstring. Residual branches are zero.

    The last norm and silu would not be linear: so every signal s comes as a pair (s, -s), each group of 16 channels holds six pairs
    and two pairs (K, -K), whose size sets the norm's divisor, and silu(z) - silu(-z) = z.
    """
    e = vae.encoder
    for parameter in (*e.parameters(), *vae.quant_conv.parameters()):
        parameter.zero_()
    for module in e.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.fill_(1)
    for c in range(3):
        e.conv_in.weight[c, c, 1, 1] = 1
        for level in (0, 1):  # means of 2 x 2, twice
            e.down_blocks[level].downsamplers[0].conv.weight[c, c, :2, :2] = 0.25
        for level in (1, 2):  # where the width changes
            e.down_blocks[level].resnets[0].conv_shortcut.weight[c, c] = 1
    haar = torch.tensor([[[1, 1], [1, 1]], [[1, -1], [1, -1]], [[1, 1], [-1, -1]], [[1, -1], [-1, 1]]]) / 2
    haar[1:] *= DETAIL
    conv = e.down_blocks[2].downsamplers[0].conv
    gain = CARRIER / 2  # the standard deviation of a group: sqrt((4 K^2 + small) / 16)
    for k in range(12):
        up = 16 * (k // 6) + 2 * (k % 6)
        conv.weight[up, k % 3, :2, :2], conv.weight[up + 1, k % 3, :2, :2] = haar[k // 3], -haar[k // 3]
        e.conv_out.weight[k, up, 1, 1], e.conv_out.weight[k, up + 1, 1, 1] = gain, -gain
    conv.bias[12:16] = conv.bias[28:32] = CARRIER * torch.tensor([1.0, -1, 1, -1])
    vae.quant_conv.weight[:12, :12, 0, 0] = torch.eye(12)
    vae.quant_conv.bias[12:] = -12.0  # log variance


@torch.no_grad()
def start_decoder(vae: AutoencoderKL) -> None:
    """Let the decoder begin with what is easy: the mean colour of every 8 x 8 pixels. Residual branches begin with zero."""
    d = vae.decoder
    for name, parameter in d.named_parameters():
        if ".conv2." in name or ".to_out." in name:
            parameter.zero_()
    vae.post_quant_conv.weight.copy_(torch.eye(12)[:, :, None, None])
    vae.post_quant_conv.bias.zero_()
    convs = [d.conv_in, *(level.upsamplers[0].conv for level in d.up_blocks[:3]), d.up_blocks[2].resnets[0].conv_shortcut]
    for conv in convs:  # channels 0 to 2 hand the colours on, the others are free
        conv.weight[:3], conv.bias[:3] = 0, 0
        at = conv.weight.shape[-1] // 2
        for c in range(3):
            conv.weight[c, c, at, at] = 0.5 if conv is d.conv_in else 1.0
    pairs = d.up_blocks[3].resnets[0].conv_shortcut  # (r, -r, g, -g), (b, -b, free, free): two groups of the last norm
    pairs.weight[:6], pairs.bias[:6] = 0, 0
    d.conv_out.weight.mul_(0.1)
    d.conv_out.bias.zero_()
    for c in range(3):
        pairs.weight[2 * c, c], pairs.weight[2 * c + 1, c] = 1, -1
        d.conv_out.weight[c, 2 * c : 2 * c + 2, 1, 1] = torch.tensor([0.95, -0.95])  # the norm's divisor on white


def images_of(data: MultiViewDataset, position: int) -> torch.Tensor:
    """All views and domains of the object at a position, (12,3,R,R) in [-1,1]."""
    sample = {k: v for k, v in stack([data.read(position)]).items() if k != "name"}
    return finish(sample, normals_renormalise=True, clamp=True)["target_vae"].flatten(0, 2)


def train_decoder(vae: AutoencoderKL, images: torch.Tensor, minutes: float, batch: int = 8, lr: float = 2e-3) -> None:
    """Absolute and squared error of decoded images (N,3,R,R); the rate falls along a cosine of the time."""
    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    with torch.no_grad():
        latents = vae.encode(images, 64)[0]
    optimizer = torch.optim.AdamW(decoder, lr=lr, weight_decay=0.0, fused=True)
    start, step, seconds = time.monotonic(), 0, 60 * minutes
    while (spent := time.monotonic() - start) < seconds:
        chosen = torch.randint(len(images), (batch,))
        out, truth = vae.decode(latents[chosen]), images[chosen]
        loss = F.l1_loss(out, truth) + F.mse_loss(out, truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent / seconds)))
        optimizer.step()
        if step % 100 == 0:
            quality = psnr(out.detach() / 2 + 0.5, truth / 2 + 0.5).mean().item()
            print(f"step {step}  {spent:.0f} s  loss {loss.item():.4f}  PSNR {quality:.2f} dB", flush=True)
        step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="rendered objects, as `python -m synth mvdiff` writes them")
    parser.add_argument("--out", required=True, type=Path, help="weights folder to write")
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()

    torch.manual_seed(0)
    clip, vae = CLIPVision(**clip_arguments(CLIP)), AutoencoderKL(**vae_arguments(VAE))
    write_linear_encoder(vae)
    start_decoder(vae)
    names, size = list_objects(args.data), {"resolution": VAE["sample_size"], "clip_size": CLIP["image_size"], "bg_color": "white"}
    held_out = max(1, len(names) // 16)
    train, test = (MultiViewDataset(args.data, part, **size) for part in (names[held_out:], names[:held_out]))
    images = torch.cat([images_of(train, i) for i in range(len(train))])
    train_decoder(vae, images, args.minutes)

    vae.half().float()  # what is stored
    with torch.no_grad():
        latents = vae.encode(images[:512], 64)[0]
        unseen = torch.cat([images_of(test, i) for i in range(held_out)])
        quality = psnr(vae.decode(vae.encode(unseen, 64)[0], 64) / 2 + 0.5, unseen / 2 + 0.5).mean().item()
    config = {**VAE, "scaling_factor": round(1 / latents.std().item(), 5)}
    write_part(args.out, "vae", config, vae.half().state_dict())
    write_part(args.out, "image_encoder", CLIP, clip.half().state_dict())
    write_json(args.out / "unet" / "config.json", UNET)
    write_json(args.out / "scheduler" / "scheduler_config.json", SCHEDULER)
    print(f"{args.out}: PSNR {quality:.2f} dB on {held_out} objects that it was not trained on")


if __name__ == "__main__":
    main()
