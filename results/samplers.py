"""Quality against cost of each sampler: a table, and a plot of it (which takes matplotlib).

    python results/samplers.py out out-embed >> results/samplers.md
    python results/samplers.py plot results/samplers.md assets/samplers.png

For the models in these folders, a masked and an embed one: 64 samples of a block, judged by judge.py.
"""
import inspect
import os
import sys
import time

import torch

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                os.path.dirname(os.path.abspath(__file__))]
from judge import Judge

from data import load_model

SETTINGS = {"masked": [{"order": order} for order in ("random", "confidence", "margin", "entropy")]
            + [{"remask": 0.02}, {"threshold": 0.9}],
            "embed": [{"eta": eta} for eta in (1.0, 0.5, 0.0)]}
STEPS = 4, 8, 16, 32, 64, 128, 256


def measure(model, judge, tokenizer, block, steps, settings):
    """Dict of the judge's measures of 64 samples, with the network calls and the seconds they took."""
    calls = []
    hook = model.net.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    known = torch.zeros(64, block, dtype=torch.bool)
    start = time.time()
    *_, (tokens, _) = model.sample(known.long(), known, steps, **settings)
    seconds = time.time() - start
    hook.remove()
    row = judge([tokenizer.decode(ids) for ids in tokens.tolist()])
    return row | {"calls": len(calls), "seconds": seconds}


def main(*folders):
    print("| model | steps | calls | seconds | 5-gram nats/char | real words | entropy |")
    print("|---" * 7 + "|")
    for folder in folders:
        model, tokenizer, cfg, _ = load_model(os.path.join(folder, "model.pt"))
        judge = Judge(os.path.join("data", cfg.dataset))
        defaults = inspect.signature(model.sample).parameters
        for settings in SETTINGS[cfg.process]:
            words = [f"{key} {value}" for key, value in settings.items() if value != defaults[key].default]
            name = ", ".join([cfg.process, *words])
            for steps in STEPS:
                if cfg.process == "masked" and steps > cfg.block_size and "remask" not in settings:
                    continue                            # it makes one call for each token at most
                row = measure(model, judge, tokenizer, cfg.block_size, steps, settings)
                print(f"| {name} | {steps} | {row['calls']} | {row['seconds']:.1f} | {row['5-gram nats']:.3f} "
                      f"| {row['real words']:.3f} | {row['entropy']:.3f} |", flush=True)


def draw(table, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    curves = {}
    with open(table) as f:
        rows = [line.strip("| \n").split(" | ") for line in f if line.startswith(("| masked", "| embed"))]
    for name, *row in rows:
        curves.setdefault(name, []).append([float(value) for value in row])
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for name, points in curves.items():
        _, calls, _, nats, _, entropy = zip(*points)
        for ax, values in zip(axes, (nats, entropy)):
            ax.plot(calls, values, "o-" if name.startswith("embed") else "s--", markersize=4, label=name)
    for ax, title in zip(axes, ("5-gram nats/char (text: 1.67)", "entropy of characters (text: 3.32)")):
        ax.set(xscale="log", xlabel="network calls", title=title)
        ax.set_xticks(STEPS, STEPS)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if sys.argv[1] == "plot":
        draw(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
