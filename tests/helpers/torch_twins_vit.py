"""Small torch Vision Transformers with timm's and T2T-ViT's layout and names, to compare with. Needs torch."""

import math

import jax.numpy as jnp
import torch
import torch.nn.functional as F
from torch import nn

from jax_transfer import trees


class Attention(nn.Module):
    def __init__(self, dim, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio, qkv_bias, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Maps images [b, 3, h, w] to (logits [b, s], features [b, d])."""

    def __init__(self, dim, depth, heads, patch, image_size, num_classes):
        super().__init__()
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, 4, True, 1e-6) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        x = self.patch_embed(x)
        return _encode(self, x)


def _encode(model, x):
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1) + model.pos_embed
    for block in model.blocks:
        x = block(x)
    features = model.norm(x)[:, 0]
    return model.head(features), features


class TorchvisionBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * dim, dim))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TorchvisionViT(nn.Module):
    """torchvision's vit_b_16: the same network under other names, with torch's own attention."""

    def __init__(self, dim, depth, heads, patch, image_size, num_classes):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.conv_proj = nn.Conv2d(3, dim, patch, patch)
        self.encoder, self.heads = nn.Module(), nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, dim))
        self.encoder.layers = nn.Module()
        for i in range(depth):
            setattr(self.encoder.layers, f"encoder_layer_{i}", TorchvisionBlock(dim, heads))
        self.encoder.ln = nn.LayerNorm(dim, eps=1e-6)
        self.heads.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.encoder.pos_embedding
        for block in self.encoder.layers.children():
            x = block(x)
        features = self.encoder.ln(x)[:, 0]
        return self.heads.head(features), features


class TokenAttention(nn.Module):
    """Attention of the release: scaled by the width of the input, with the values added to the output."""

    def __init__(self, features, dim):
        super().__init__()
        self.scale = features**-0.5
        self.qkv = nn.Linear(features, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        weights = torch.softmax(self.scale * q @ k.transpose(1, 2), dim=-1)
        return v + self.proj(weights @ v)


class TokenTransformer(nn.Module):
    def __init__(self, features, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(features)
        self.attn = TokenAttention(features, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim)

    def forward(self, x):
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenPerformer(nn.Module):
    """Performer layer of the release, whose linear layer returns k, q, v in this order."""

    def __init__(self, features, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(features)
        self.kqv = nn.Linear(features, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.Dropout(0.1))
        self.m = dim // 2
        directions = nn.init.orthogonal_(torch.empty(self.m, dim)) * math.sqrt(self.m)
        self.w = nn.Parameter(directions, requires_grad=False)

    def phi(self, x):
        return torch.exp(torch.einsum("bti,mi->btm", x, self.w) - (x * x).sum(-1, keepdim=True) / 2) / math.sqrt(self.m)

    def forward(self, x):
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        k, q = self.phi(k), self.phi(q)
        total = torch.einsum("btm,bm->bt", q, k.sum(1))[..., None]
        values = torch.einsum("btd,btm->bdm", v, k)
        x = v + self.proj(torch.einsum("btm,bdm->btd", q, values) / (total + 1e-8))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    def __init__(self, token_layer, token_dim, dim):
        super().__init__()
        self.attention1 = token_layer(3 * 49, token_dim)
        self.attention2 = token_layer(9 * token_dim, token_dim)
        self.project = nn.Linear(9 * token_dim, dim)

    def forward(self, x):
        x = self.attention1(F.unfold(x, 7, stride=4, padding=2).transpose(1, 2))
        x = self.attention2(F.unfold(self.image(x), 3, stride=2, padding=1).transpose(1, 2))
        return self.project(F.unfold(self.image(x), 3, stride=2, padding=1).transpose(1, 2))

    def image(self, x):
        side = math.isqrt(x.shape[1])
        return x.transpose(1, 2).unflatten(2, (side, side))


class T2TViT(nn.Module):
    """Maps images [b, 3, h, w] to (logits [b, s], features [b, d])."""

    def __init__(self, token_layer, dim, depth, heads, token_dim, image_size, num_classes):
        super().__init__()
        self.tokens_to_token = TokensToToken(token_layer, token_dim, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = _sinusoids(1 + (image_size // 16) ** 2, dim)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads, 3, False, 1e-5) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x):
        return _encode(self, self.tokens_to_token(x))


def _sinusoids(n, d):
    table = torch.zeros(1, n, d)
    for position in range(n):
        for j in range(0, d, 2):
            angle = position / 10000 ** (j / d)
            table[0, position, j], table[0, position, j + 1] = math.sin(angle), math.cos(angle)
    return table


def random(model, seed=0):
    """Returns the model in evaluation mode, with all trainable arrays random so that each affects the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if not tensor.requires_grad:
                continue
            if "norm" in name and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.ndim in (2, 4):
                tensor.normal_(std=1.5 / math.sqrt(tensor[0].numel()), generator=generator)
            else:
                tensor.normal_(std=0.3, generator=generator)
    return model.eval()


def to_dicts(model):
    """Returns the weights of a torch transformer as (params, stats); arrays that are not trained go to the stats."""
    params, stats = {}, {}
    for name, tensor in model.named_parameters():
        *parents, leaf = name.split(".")
        value = jnp.asarray(tensor.detach().numpy().copy())
        if leaf == "weight":
            leaf = "scale" if value.ndim == 1 else "kernel"
            value = jnp.transpose(value, {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[value.ndim])
        (params if tensor.requires_grad else stats)["/".join([*parents, leaf])] = value
    return trees.unflatten(params), trees.unflatten(stats)
