"""What sampling in few steps costs when the model is perfect: the exact posterior of the tests' Markov chain.

    python results/few_steps.py

Prints the distance (total variation) of the samples' bigrams from the chain's, 20,000 samples of 12 tokens.
"""
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import test_diffusion as exact
from diffusion import Embed, times

TRUE = (exact.START[:, None] * exact.CHAIN).float()


@torch.no_grad()
def settle(model):
    """Lets the schedule of an Embed follow the bound of its exact posterior."""
    for i in range(30):
        x0, t = exact.chain_draw(64), times(np.random.default_rng(i), 1, 64)[0]
        xt = model.corrupt(x0, t)
        model.observe(x0, model.estimate(model.denoise(xt, t), xt), t, torch.ones_like(x0))
        model.adapt(lambda tensor: tensor)
    return model


def distance(model, steps, **settings):
    torch.manual_seed(0)
    known = torch.zeros(20_000, exact.T_CHAIN, dtype=torch.bool)
    *_, (x, _) = model.sample(known.long(), known, steps, **settings)
    pairs = torch.bincount((x[:, :-1] * exact.V_CHAIN + x[:, 1:]).flatten(), minlength=exact.V_CHAIN ** 2)
    return float((pairs.view_as(TRUE) / pairs.sum() - TRUE).abs().sum() / 2)


masked, embed = exact.exact_chain("masked"), settle(exact.exact_chain("embed"))
ORDERS = "random", "confidence", "margin", "entropy"
print("| steps | " + " | ".join(ORDERS) + " | embed, AHEAD 0 | 1 | 2 | 3 | 4 | 2, eta 0 |")
print("|---" * 11 + "|")
for steps in 2, 4, 8, 12, 16, 32:
    row = [distance(masked, steps, order=order) for order in ORDERS]
    for Embed.AHEAD in 0.0, 1.0, 3.0, 4.0, 2.0:
        row.append(distance(embed, steps))
    row.insert(6, row.pop())                            # AHEAD 2, the code's, last in the loop: it stays
    row.append(distance(embed, steps, eta=0.0))
    print(f"| {steps} | " + " | ".join(f"{value:.4f}" for value in row) + " |", flush=True)
