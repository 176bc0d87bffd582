"""How loose is the bound? A masked model's exact likelihood by the chain rule, in six orders, beside it.

    python results/chain_rule.py out 64                     # a folder, a number of random validation crops
    python results/chain_rule.py out 16 32                  # and of random orders for each of them

The chain rule takes a network call for each token: p(x_i | the tokens before it in that order), while the
rest is [MASK]. An order may depend on the logits, which come before the token is seen (arXiv:2603.01367).
The bound is the mean over all fixed orders, from 64 draws of time and masks for each crop: random orders give
it once more. A sampler that draws its order writes a text with the mean over orders of its probabilities, so
its likelihood is higher: the last line has the mean over those orders that were drawn, which is a part of that.
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import crops, load_data
from diffusion import ORDERS, load_model, times

ALL_ORDERS = {
    "left to right": lambda p: -torch.arange(len(p)),
    "right to left": lambda p: torch.arange(len(p)),
    **ORDERS,
}


def chain_rule(model, x0, order):
    """(n,) nats per token of x0 (n, T): the tokens with the highest score of an order come first."""
    n, T = x0.shape
    x = torch.full_like(x0, model.V)
    nll = torch.zeros(n)
    for left in range(T, 0, -1):                        # tokens that are still to come in each crop
        masked = x == model.V
        logits = model.denoise(x, masked)                                       # (n left, V)
        score = order(logits.softmax(1))
        first = score.view(n, left).argmax(1) + left * torch.arange(n)          # (n,)
        truth = x0[masked][first]
        nll += F.cross_entropy(logits[first], truth, reduction="none")
        row, place = masked.nonzero()[first].T
        x[row, place] = truth
    return nll / T


def report(name, nats):
    """The mean over crops and its standard error; each crop counts as one."""
    error = nats.std() / len(nats) ** 0.5
    print(f"{name:30} {nats.mean():.4f} ± {error:.4f} nats/token", flush=True)


torch.set_grad_enabled(False)
folder = sys.argv[1]
n = int(sys.argv[2])
n_orders = int(sys.argv[3]) if len(sys.argv) > 3 else 1
model, _, cfg, _ = load_model(f"{folder}/model.pt")
_, splits = load_data(cfg.dataset, cfg.block_size)
x0 = crops(splits["val"], np.random.default_rng(0), n, cfg.block_size)
torch.manual_seed(0)
random = ALL_ORDERS.pop("random")
for name, order in ALL_ORDERS.items():
    report(f"chain rule, {name}", chain_rule(model, x0, order))
nll = torch.stack([chain_rule(model, x0, random) for _ in range(n_orders)])                # (n_orders, n)
report("chain rule, random", nll.mean(0))
draws = []
for i in range(64):
    t = times(np.random.default_rng(i), 1, n)[0]
    draws.append(model.nelbo(x0, t))
report("bound", torch.stack(draws).mean(0))
mix = (-nll * cfg.block_size).logsumexp(0) - math.log(n_orders)
report(f"a mix of {n_orders} random orders", -mix / cfg.block_size)
