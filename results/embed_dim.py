"""How readable a token is, seen alone, when V embeddings share D dimensions: what embed_dim must be at least.

    python results/embed_dim.py data/my                     # a dataset's token frequencies

Random embeddings, the exact posterior. Prints the cross-entropy (nats) at the clean end of the schedule,
where the bound starts, and at one and two nats of logsnr below it.
"""
import json
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from config import Config
from diffusion import Embed

folder = sys.argv[1]
with open(f"{folder}/meta.json", encoding="utf-8") as f:
    V = json.load(f)["vocab_size"]
tokens = np.memmap(f"{folder}/train.bin", np.uint16, "r")
counts = np.bincount(tokens[:10_000_000], minlength=V) + 1
bias = torch.from_numpy(np.log(counts / counts.sum())).float()
x = torch.from_numpy(np.random.default_rng(0).choice(tokens, 2000).astype(np.int64))
print(f"V = {V:,}, 2,000 tokens\n{'D':>3}   cross-entropy (nats) at logsnr 5.5, 4.5 and 3.5, less log D")
for D in 4, 8, 16, 32, 64:
    torch.manual_seed(0)
    E = Embed(Config(n_layer=1, n_head=1, n_embd=2, embed_dim=D), V).table().detach()
    row = []
    for logsnr in torch.tensor([5.5, 4.5, 3.5]) - np.log(D):
        z = logsnr.sigmoid().sqrt() * E[x] + (-logsnr).sigmoid().sqrt() * torch.randn(len(x), D)
        logits = logsnr.sigmoid().sqrt() / (-logsnr).sigmoid() * z @ E.T + bias
        row.append(float(F.cross_entropy(logits, x)))
    print(f"{D:3}" + "".join(f"{nats:10.4f}" for nats in row))
