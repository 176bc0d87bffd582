"""The network: a bidirectional Transformer that is told how much noise it looks at.

A GPT block, with these differences:
- no causal mask: every position sees every other one;
- the time enters each layer as shift, scale and gate (adaLN-single: PixArt-alpha, arXiv:2310.00426, 2.3);
- rotary positions, RMSNorm without gains, normalised queries and keys, ReLU^2, no biases;
- projections back into the residual stream start at zero, so that every layer starts as the identity;
- weights are float32 and are cast where they are used, so bfloat16 needs no autocast.
"""
import torch
import torch.nn.functional as F
from torch import nn


def norm(x):
    """RMSNorm, written out: in eager mode on a CPU a step is a few percent shorter than with F.rms_norm."""
    return x * ((x * x).mean(-1, keepdim=True) + 1e-6).rsqrt()

class Linear(nn.Linear):
    """A matrix without bias, kept in float32 and applied in the precision of its input."""

    def __init__(self, n_in, n_out, zero=False):
        super().__init__(n_in, n_out, bias=False)
        nn.init.normal_(self.weight, std=0.0 if zero else n_in ** -0.5)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

def attention(q, k, v):
    """softmax(q k' / sqrt d) v over (B, H, T, d); written out in bfloat16 on a CPU, where that is faster."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return (q * q.size(-1) ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)

class Block(nn.Module):
    """Attention and MLP on the residual stream x (B, T, C), each shifted, scaled and gated by the time."""

    attention = staticmethod(attention)                 # bench.py has a causal one

    def __init__(self, cfg):
        super().__init__()
        C = cfg.n_embd
        self.n_head, self.dropout = cfg.n_head, cfg.dropout
        self.qkv = Linear(C, 3 * C)
        self.proj = Linear(C, C, zero=True)
        self.up = Linear(C, 4 * C)
        self.down = Linear(4 * C, C, zero=True)

    def attend(self, x, cos, sin):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3 * self.n_head, C // self.n_head).transpose(1, 2).chunk(3, dim=1)
        qk = norm(torch.cat((q, k), dim=1))                                     # (B, 2H, T, C/H)
        a, b = qk.chunk(2, dim=-1)
        q, k = (qk * cos + torch.cat((-b, a), dim=-1) * sin).chunk(2, dim=1)
        y = self.attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))

    def forward(self, x, mod, cos, sin):
        shift1, scale1, gate1, shift2, scale2, gate2 = mod.unbind(1)            # (B, 1, C) each
        y = self.attend(torch.addcmul(shift1, norm(x), scale1), cos, sin)
        x = torch.addcmul(x, F.dropout(y, self.dropout, self.training), gate1)
        h = F.relu(self.up(torch.addcmul(shift2, norm(x), scale2)))
        y = self.down(h * h)
        return torch.addcmul(x, F.dropout(y, self.dropout, self.training), gate2)

class Transformer(nn.Module):
    """(B, T, C) vectors and a time (B,) in [0, 1] in, (B, T, C) normalised features out; T <= block_size."""

    def __init__(self, cfg):
        super().__init__()
        C, hd = cfg.n_embd, cfg.n_embd // cfg.n_head
        self.dtype = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        # time: 128 sines and cosines -> MLP -> six vectors for all layers, to which each layer adds its own
        self.register_buffer("freqs", 1000 * 10000 ** (-torch.arange(64) / 64), persistent=False)
        self.time1, self.time2 = Linear(128, C), Linear(C, 6 * C, zero=True)
        identity = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])                 # shift, scale, gate; twice
        self.table = nn.Parameter(identity[None, :, None].repeat(cfg.n_layer, 1, C))
        # rotary positions (RoFormer, arXiv:2104.09864)
        angle = torch.arange(cfg.block_size)[:, None] * 10000 ** (-torch.arange(0, hd, 2) / hd)
        self.register_buffer("cos", angle.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angle.sin().repeat(1, 2), persistent=False)

    def forward(self, x, t):
        B, T, C = x.shape
        angle = t.float()[:, None] * self.freqs                                 # (B, 64)
        time = self.time2(F.silu(self.time1(torch.cat((angle.cos(), angle.sin()), dim=1))))
        mod = time.view(B, 1, 6, 1, C) + self.table[:, :, None]                 # (B, n_layer, 6, 1, C)
        mod, x = mod.to(self.dtype), norm(x.to(self.dtype))
        cos, sin = self.cos[:T].to(self.dtype), self.sin[:T].to(self.dtype)
        for i, block in enumerate(self.blocks):
            x = block(x, mod[:, i], cos, sin)
        return norm(x)
