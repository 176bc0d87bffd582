"""RoBERTa (arXiv:1907.11692) as the network of Masked: prepare_roberta.py fills in its weights.

It differs from model.py's Transformer: LayerNorm behind each sum, learned positions, biases, GELU, and nobody
tells it the time, since the [MASK]s that it sees say as much.
"""
import torch
import torch.nn.functional as F
from torch import nn

from config import fail

POSITIONS = 512

# The fused kernel that torch takes outside training is another GELU on CUDA (by tanh): one answer everywhere.
torch.backends.mha.set_fastpath_enabled(False)


class Roberta(nn.Module):
    """Embedded tokens (B, T, C) and a time (B,), ignored, in; (B, T, C) features for the tied head out."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.process != "masked":
            fail(f"process is {cfg.process!r}, but RoBERTa reads tokens and [MASK]s: pass --process=masked")
        if cfg.block_size > POSITIONS:
            fail(f"block_size is {cfg.block_size}: RoBERTa has {POSITIONS} positions, so pass that or less")
        C = cfg.n_embd
        self.dtype = torch.bfloat16 if cfg.dtype == "bfloat16" else torch.float32
        self.positions = nn.Parameter(0.02 * torch.randn(POSITIONS, C))
        self.norm = nn.LayerNorm(C)
        self.dropout = nn.Dropout(cfg.dropout)
        # torch's layer is RoBERTa's, but for a dropout behind GELU that RoBERTa didn't have
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(C, cfg.n_head, 4 * C, cfg.dropout, activation="gelu", batch_first=True)
            for _ in range(cfg.n_layer)
        )
        # what RoBERTa has between its layers and the head
        self.last = nn.Linear(C, C)
        self.last_norm = nn.LayerNorm(C)

    def forward(self, x, t):
        # torch's layers don't cast their weights, so autocast does; on CUDA it keeps norms in float32
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            x = x + self.positions[:x.size(1)]
            x = self.dropout(self.norm(x))
            for block in self.blocks:
                x = block(x)
            x = self.last_norm(F.gelu(self.last(x)))
        return x.to(self.dtype)
