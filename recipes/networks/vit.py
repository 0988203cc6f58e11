"""A vision transformer for (n, 3, 224, 224) images: Dosovitskiy et al., arXiv 2010.11929."""

import torch
from torch import Tensor, nn

from recipes.networks.cct import Block


class VisionTransformer(nn.Module):
    """Patches become tokens, blocks mix them with a class token, which is classified."""

    def __init__(self, *, blocks: int, width: int, heads: int, patch: int, size: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        tokens = (size // patch) ** 2 + 1
        self.positions = nn.Parameter(torch.empty(1, tokens, width).normal_(std=0.02))
        self.blocks = nn.Sequential(*(Block(width, heads, 4 * width, 0.0) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, size, size) -> logits (n, 1000)."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        first = self.class_token.expand(len(images), -1, -1)
        tokens = torch.cat((first, patches), 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


def vit_tiny() -> VisionTransformer:
    """Return ViT-Ti/16: 12 blocks of width 192 with 3 heads on 196 patches."""
    return VisionTransformer(blocks=12, width=192, heads=3, patch=16, size=224)
