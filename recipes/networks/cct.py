"""A compact convolutional transformer for (n, 3, 32, 32) images: Hassani et al., arXiv 2104.05704."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    """Self-attention whose query, key and value come from one linear layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, tokens, width) -> the same."""
        query, key, value = self.in_proj(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and a perceptron of two layers, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_pre_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_pre_norm = nn.LayerNorm(width)
        first, second = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.mlp = nn.Sequential(first, nn.GELU(), nn.Dropout(dropout), second, nn.Dropout(dropout))

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, tokens, width) -> the same."""
        tokens = tokens + self.attention(self.attention_pre_norm(tokens))
        out: Tensor = tokens + self.mlp(self.mlp_pre_norm(tokens))
        return out


class AttentionPool(nn.Module):
    """The mean of all tokens, weighted by a learned softmax."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_pool = nn.Linear(width, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, tokens, width) -> (n, width)."""
        weights = self.attention_pool(tokens).softmax(dim=1)
        return (weights.transpose(1, 2) @ tokens).squeeze(1)


class CompactTransformer(nn.Module):
    """A convolution makes tokens, transformer blocks mix them, a weighted mean is classified."""

    def __init__(self, *, blocks: int, width: int, heads: int, hidden: int, tokens: int, classes: int) -> None:
        super().__init__()
        layers = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.tokenizer = nn.Sequential(OrderedDict(tokenizer_layers=layers))
        self.positional_embeddings = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, 0.1) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.pool = AttentionPool(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, 32, 32) -> logits (n, classes)."""
        tokens = self.tokenizer(images).flatten(2).transpose(1, 2) + self.positional_embeddings
        logits: Tensor = self.fc(self.pool(self.norm(self.blocks(tokens))))
        return logits


def cct4() -> CompactTransformer:
    """Return CCT-4/3x1 for CIFAR-10: 4 blocks of width 128 with 4 heads on 256 tokens."""
    return CompactTransformer(blocks=4, width=128, heads=4, hidden=256, tokens=256, classes=10)
