"""How loose is the bound? A masked model's exact likelihood by the chain rule, in six orders, beside it.

    python results/chain_rule.py out 64                     # a folder, a number of random validation crops

The chain rule takes a network call for each token: p(x_i | the tokens before it in that order), the rest
being [MASK]. An order may depend on the logits, computed before the token is seen (arXiv:2603.01367).
The bound is the mean over all fixed orders, from 64 draws of time and masks for each crop.
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import crops, load_data
from diffusion import ORDERS, load_model, times


def report(name, nats):
    """Mean over crops and its standard error; each crop counts as one."""
    print(f"{name:30} {nats.mean():.4f} ± {nats.std() / len(nats) ** 0.5:.4f} nats/token", flush=True)

torch.set_grad_enabled(False)
folder, n = sys.argv[1], int(sys.argv[2])
model, _, cfg, _ = load_model(f"{folder}/model.pt")
T, V = cfg.block_size, model.V
torch.manual_seed(0)
x0 = crops(load_data(cfg.dataset, T)[1]["val"], np.random.default_rng(0), n, T)
place = {"left to right": lambda p: -torch.arange(len(p)), "right to left": lambda p: torch.arange(len(p))}
for name, order in (place | ORDERS).items():
    x, nll = torch.full_like(x0, V), []
    for left in range(T, 0, -1):                        # tokens to come in each crop
        at = (x == V).flatten().nonzero().squeeze(1)                            # (n left,)
        logits = model.denoise_at(x, at)
        first = order(logits.softmax(1)).view(n, left).argmax(1) + left * torch.arange(n)       # (n,)
        at, target = at[first], x0.flatten()[at[first]]
        nll.append(F.cross_entropy(logits[first], target, reduction="none"))
        x = x.flatten().index_copy(0, at, target).view(n, T)
    report(f"chain rule, {name}", torch.stack(nll).mean(0))
bounds = [model.nelbo(x0, times(np.random.default_rng(i), 1, n)[0]) for i in range(64)]
report("bound", torch.stack(bounds).mean(0))
