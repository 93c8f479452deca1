"""CLIP vision tower with projection (arXiv 2103.00020), by default ViT-L/14, and the preparation of its input.

Names of parameters are those of the published checkpoints, including the spelling of `pre_layrnorm`. Never trained here.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@functools.cache
def constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """MEAN and STD, (3,1,1) fp32, made once per device: each copy from the host would wait for the device."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return mean, std


def resize_shorter_side(image: Image.Image, size: int, resample: int) -> Image.Image:
    """Resize so that the shorter side is `size` and the longer one int(size * longer / shorter)."""
    w, h = image.size
    if (w, h) == (size, size):
        return image
    short, long = min(w, h), max(w, h)
    side = int(size * long / short)
    return image.resize((size, side) if w <= h else (side, size), resample)


def preprocess_pil(image: Image.Image | np.ndarray, size: int = 224) -> np.ndarray:
    """Image (PIL, or uint8 (H,W,3)) -> (3,size,size) fp32, normalised for CLIP.

    The shorter side is resized to `size` (PIL's antialiased bicubic), then the centre is cropped. This is what sampling does.
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image = resize_shorter_side(image.convert("RGB"), size, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    return ((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)


def preprocess_tensor(images: Tensor, size: int = 224, antialias: bool = False) -> Tensor:
    """Images (N,3,H,W) in [0,1] -> (N,3,size,size) fp32, normalised for CLIP.

    Bicubic straight to a square; without antialiasing this is how the published training did it (and not how it sampled).
    """
    resized = F.interpolate(images.float(), (size, size), mode="bicubic", align_corners=False, antialias=antialias)
    mean, std = constants(resized.device)
    return (resized - mean) / std


def to_uint8(images: Tensor) -> Tensor:
    """[0,1] -> uint8 by truncation, as the published sampler turns its input into 8 bits."""
    return (images * 255).to(torch.uint8)


class Embeddings(nn.Module):
    """Patches row by row behind the class token, + positions: (N,3,S,S) -> (N,1 + (S/patch)^2,C)."""

    def __init__(self, hidden: int, image_size: int, patch: int):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(hidden))
        self.patch_embedding = nn.Conv2d(3, hidden, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((image_size // patch) ** 2 + 1, hidden)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (N,C,h,w) -> (N,hw,C)
        tokens = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        return tokens + self.position_embedding.weight


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases, no mask."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.q_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """fc2(quick_gelu(fc1(x))), quick_gelu(x) = x * sigmoid(1.702 x)."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden, intermediate)
        self.fc2 = nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class Layer(nn.Module):
    """Pre-norm transformer layer, (N,T,C) -> (N,T,C)."""

    def __init__(self, hidden: int, intermediate: int, heads: int, eps: float):
        super().__init__()
        self.self_attn = SelfAttention(hidden, heads)
        self.layer_norm1 = nn.LayerNorm(hidden, eps)
        self.mlp = MLP(hidden, intermediate)
        self.layer_norm2 = nn.LayerNorm(hidden, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionTransformer(nn.Module):
    """(N,3,S,S) -> (N,C): the class token after the last layer and its norm."""

    def __init__(self, hidden: int, intermediate: int, layers: int, heads: int, image_size: int, patch: int, eps: float):
        super().__init__()
        self.embeddings = Embeddings(hidden, image_size, patch)
        self.pre_layrnorm = nn.LayerNorm(hidden, eps)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer(hidden, intermediate, heads, eps) for _ in range(layers))
        self.post_layernorm = nn.LayerNorm(hidden, eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x[:, 0])


class CLIPVision(nn.Module):
    """(N,3,S,S), normalised by `preprocess_*`, -> image embedding (N,projection_dim), not scaled to unit length."""

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        image_size: int = 224,
        patch_size: int = 14,
        projection_dim: int = 768,
        layer_norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.vision_model = VisionTransformer(
            hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, image_size, patch_size, layer_norm_eps
        )
        self.visual_projection = nn.Linear(hidden_size, projection_dim, bias=False)
        self.image_size, self.projection_dim = image_size, projection_dim

    def forward(self, pixels: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model(pixels.to(self.visual_projection.weight.dtype)))
