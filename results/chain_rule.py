"""How loose is the bound? A masked model's exact likelihood in one order, left to right, beside its bound.

    python results/chain_rule.py out [number of crops]

The chain rule takes a network call for each token: p(x_i | x_<i), everything from i on being [MASK]. The
bound is the mean of that over all orders. Random crops of the validation split, the same for both.
"""
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import crops, load_bin, load_model
from diffusion import times


@torch.no_grad()
def main(folder, n=128):
    model, _, cfg, _ = load_model(os.path.join(folder, "model.pt"))
    T, V = cfg.block_size, model.V
    torch.manual_seed(0)
    x0 = crops(load_bin(cfg.dataset, "val", V, T), np.random.default_rng(0), n, T)
    forward = torch.arange(T).expand(n, T)
    orders = {"left to right": forward, "right to left": forward.flip(1),
              "a random order": torch.rand(n, T).argsort(1)}
    for name, places in orders.items():
        x, nll = torch.full_like(x0, V), []
        for i in range(T):
            at = places[:, i] + T * torch.arange(n)
            logits = model.denoise_at(x, (x == V).float().mean(1), at)
            nll.append(F.cross_entropy(logits, x0.flatten()[at], reduction="none"))
            x = x.flatten().index_copy(0, at, x0.flatten()[at]).view(n, T)
        report(f"chain rule, {name}", torch.stack(nll).mean(0))
    bounds = [model.nelbo(x0, times(np.random.default_rng(i), 1, n)[0]) for i in range(64)]
    report("bound", torch.stack(bounds).mean(0))


def report(name, nats):
    """Mean over crops and its standard error; each crop counts as one."""
    print(f"{name:30} {nats.mean():.4f} ± {nats.std() / len(nats) ** 0.5:.4f} nats/token", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
