"""Quality against cost of each sampler: a table, and a plot of it (which takes matplotlib).

    python results/samplers.py out out-embed > table.md                         # folders of trained models
    python results/samplers.py plot table.md assets/samplers.png

64 samples of a block each, with the same seed, judged by judge.py.
"""
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])
from judge import Judge

from diffusion import load_model

SETTINGS = {"masked": {}, "masked, order confidence": {"order": "confidence"},
            "masked, order margin": {"order": "margin"}, "masked, order entropy": {"order": "entropy"},
            "masked, remask 0.02": {"remask": 0.02}, "masked, threshold 0.9": {"threshold": 0.9},
            "embed": {}, "embed, eta 0.5": {"eta": 0.5}, "embed, eta 0.0": {"eta": 0.0}}
STEPS = 4, 8, 16, 32, 64, 128, 256

def measure(model, judge, tokenizer, T, steps, settings):
    """Of 64 samples: network calls, seconds, and the judge's 5-gram nats, share of real words and entropy."""
    calls = []
    hook = model.net.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    known = torch.zeros(64, T, dtype=torch.bool)
    start = time.time()
    *_, (tokens, _) = model.sample(known.long(), known, steps, **settings)
    seconds = time.time() - start
    hook.remove()
    nats, real, entropy, _ = judge([tokenizer.decode(ids) for ids in tokens.tolist()]).values()
    return len(calls), seconds, nats, real, entropy

def table(folder):
    model, tokenizer, cfg, _ = load_model(f"{folder}/model.pt")
    judge = Judge(f"data/{cfg.dataset}")
    for name, settings in SETTINGS.items():
        for steps in STEPS if name.startswith(cfg.process) else ():
            if cfg.process == "embed" or "remask" in settings or steps <= cfg.block_size:
                calls, *row = measure(model, judge, tokenizer, cfg.block_size, steps, settings)
                print("| {} | {} | {} | {:.1f} | {:.3f} | {:.3f} | {:.3f} |".format(name, steps, calls, *row))

def plot(path, picture):
    from matplotlib import pyplot as plt
    with open(path, encoding="utf-8") as f:
        rows = [line.strip("| \n").split(" | ") for line in f
                if line.startswith(("| masked", "| embed")) and line.count("|") == 8]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    titles = {4: "5-gram nats/char (text: 1.67)", 6: "entropy of characters (text: 3.32)"}     # columns
    for ax, (column, title) in zip(axes, titles.items()):
        for name in dict.fromkeys(row[0] for row in rows):
            points = [(float(row[2]), float(row[column])) for row in rows if row[0] == name]
            ax.plot(*zip(*points), "o-" if "embed" in name else "s--", markersize=4, label=name)
        ax.set(xscale="log", xlabel="network calls", title=title, xticks=STEPS, xticklabels=STEPS)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(picture, dpi=110)

if __name__ == "__main__":
    if sys.argv[1] == "plot":
        plot(*sys.argv[2:])
    else:
        print("| model | steps | calls | seconds | 5-gram nats | real words | entropy |\n" + "|---" * 7 + "|")
        for folder in sys.argv[1:]:
            table(folder)
