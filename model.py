"""The network: a bidirectional Transformer that is told how much noise it looks at.

A GPT block, with these differences:
- no causal mask: every position sees every other one;
- half of what an MLP reads stands at the two positions to the left and the two to the right, see look_aside();
- the time enters each layer as shift, scale and gate (adaLN-single: PixArt-alpha, arXiv:2310.00426, 2.3);
- rotary positions, RMSNorm without gains (of queries and keys, too, with qk_norm), ReLU^2, no biases;
- projections back into the residual stream start at zero, so that every layer starts as the identity;
- weights are float32 and are cast where they are used, so bfloat16 needs no autocast.
"""
import torch
import torch.nn.functional as F
from torch import nn


def norm(x):
    """RMSNorm without gains: every vector gets the length sqrt(C)."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


class Linear(nn.Linear):
    """A matrix without bias, kept in float32 and applied in the precision of its input."""

    def __init__(self, n_in, n_out, zero=False):
        super().__init__(n_in, n_out, bias=False)
        std = 0.0 if zero else n_in ** -0.5
        nn.init.normal_(self.weight, std=std)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x, rotary):
    """Rotary positions (RoFormer, arXiv:2104.09864): turns pairs of channels by an angle for each position.

    rotary (2, T, d) has their cosines and sines. A pair (a, b), half the d channels apart, becomes
    (a cos - b sin, b cos + a sin). The minus is in sin.
    """
    cos, sin = rotary
    halves = x.unflatten(-1, (2, -1))
    swapped = halves.flip(-2).flatten(-2)               # (b, a)
    return torch.addcmul(x * cos, swapped, sin)


def look_aside(x, places):
    """x (B, T, C), in which an eighth of the channels comes from each of these places to the left (-: right).

    Beyond the ends there are zeros. No weights, yet worth .11 nats: what a [MASK] needs most is what stands
    beside it. The idea is from video (TSM, arXiv:1811.08383).
    """
    T = x.size(1)
    parts = list(x.chunk(8, dim=-1))                    # those behind the first few stay as they are
    for i, n in enumerate(places):
        n = max(-T, min(n, T))
        parts[i] = F.pad(parts[i], (0, 0, n, -n))       # n zeros in front, and as many places less at the end
    return torch.cat(parts, dim=-1)


class Block(nn.Module):
    """Attention and MLP on the residual stream x (B, T, C), each shifted, scaled and gated by the time."""

    causal = False                                      # bench.py compares with a GPT, which sets it to True

    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_embd
        self.n_head = cfg.n_head
        self.dropout = nn.Dropout(cfg.dropout)
        self.qk_norm = norm if cfg.qk_norm else nn.Identity()
        self.qkv = Linear(C, 3 * C)
        self.proj = Linear(C, C, zero=True)
        self.up = Linear(C, 4 * C)
        self.down = Linear(4 * C, C, zero=True)

    def attend(self, x, rotary):
        B, T, C = x.shape
        H = self.n_head
        heads = self.qkv(x).view(B, T, 3 * H, C // H)
        heads = heads.transpose(1, 2)                                           # (B, 3 H, T, C / H)
        q, k, v = heads.chunk(3, dim=1)
        q = rotate(self.qk_norm(q), rotary)
        k = rotate(self.qk_norm(k), rotary)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        y = y.transpose(1, 2)                                                   # (B, T, H, C / H)
        y = y.reshape(B, T, C)
        return self.proj(y)

    def mlp(self, x):
        h = F.relu(self.up(x))
        return self.down(h * h)

    def forward(self, x, mod, rotary):
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.unbind(1)            # (B, 1, C) each
        # torch.addcmul(a, b, c) is a + b * c, in one pass over the memory
        y = torch.addcmul(shift1, norm(x), scale1)
        y = self.attend(y, rotary)
        x = torch.addcmul(x, self.dropout(y), gate1)
        y = torch.addcmul(shift2, norm(x), scale2)
        places = (2, 1) if self.causal else (2, 1, -1, -2)
        y = look_aside(y, places)
        y = self.mlp(y)
        return torch.addcmul(x, self.dropout(y), gate2)


class Transformer(nn.Module):
    """(B, T, C) vectors and a time (B,) in [0, 1] in, (B, T, C) normalised features out; T <= block_size."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_embd
        self.dtype = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        # the time: 128 sines and cosines -> MLP -> six vectors for all layers, to which each layer adds its own
        self.time1 = Linear(128, C)
        self.time2 = Linear(C, 6 * C, zero=True)
        identity = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])                 # shift, scale, gate; twice
        table = identity[:, None].repeat(cfg.n_layer, 1, C)
        self.table = nn.Parameter(table)                                        # (n_layer, 6, C)
        # the positions: an angle for each pair of channels of a head
        d = C // cfg.n_head
        turns = 10000 ** (-torch.arange(0, d, 2) / d)
        angle = torch.outer(torch.arange(cfg.block_size), turns)
        angle = torch.cat((-angle, angle), dim=1)                               # the minus is for rotate()
        rotary = torch.stack((angle.cos(), angle.sin()))                        # (2, block_size, d)
        self.register_buffer("rotary", rotary, persistent=False)                # made anew, not saved

    def modulation(self, t):
        """(B, n_layer, 6, 1, C): shift, scale and gate of attention and of the MLP in each layer, at t (B,)."""
        waves = 1000 * 10000 ** (-torch.arange(64, device=t.device) / 64)
        angle = t.float()[:, None] * waves                                      # (B, 64)
        features = torch.cat((angle.cos(), angle.sin()), dim=1)
        hidden = F.silu(self.time1(features))
        shared = self.time2(hidden).view(len(t), 1, 6, 1, -1)
        own = self.table[:, :, None]                                            # (n_layer, 6, 1, C)
        return shared + own

    def forward(self, x, t):
        mod = self.modulation(t).to(self.dtype)
        rotary = self.rotary[:, :x.size(1)].to(self.dtype)                      # (2, T, d)
        x = norm(x.to(self.dtype))
        for i, block in enumerate(self.blocks):
            x = block(x, mod[:, i], rotary)
        return norm(x)
