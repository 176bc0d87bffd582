"""Quality against cost of each sampler: a table, and a plot of it (which takes matplotlib).

    python results/samplers.py out out-embed > table.md                         # folders of trained models
    python results/samplers.py plot table.md assets/samplers.png

64 samples of a block each, with the same seed, are judged by judge.py.
"""
import sys
import time
from pathlib import Path

import torch

HERE, ROOT = Path(__file__).resolve().parents[:2]
sys.path[:0] = str(HERE), str(ROOT)
from judge import Judge

from diffusion import load_model

SETTINGS = {
    "masked": {},
    "masked, order confidence": {"order": "confidence"},
    "masked, order margin": {"order": "margin"},
    "masked, order entropy": {"order": "entropy"},
    "masked, remask 0.02": {"remask": 0.02},
    "masked, threshold 0.9": {"threshold": 0.9},
    "embed": {},
    "embed, eta 0.5": {"eta": 0.5},
    "embed, eta 0.0": {"eta": 0.0},
}
STEPS = 4, 8, 16, 32, 64, 128, 256
HEAD = "| model | steps | calls | seconds | 5-gram nats | real words | entropy |\n" + "|---" * 7 + "|"
ROW = "| {} | {} | {} | {:.1f} | {:.3f} | {:.3f} | {:.3f} |"


def measure(model, judge, tokenizer, T, steps, settings):
    """Of 64 samples: network calls, seconds, and the judge's 5-gram nats, share of real words and entropy."""
    calls = []
    hook = model.net.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    known = torch.zeros(64, T, dtype=torch.bool, device=model.bias.device)
    start = time.time()
    *_, (tokens, _) = model.sample(known.long(), known, steps, **settings)
    ids = tokens.tolist()                               # waits for the device
    seconds = time.time() - start
    hook.remove()
    texts = [tokenizer.decode(row) for row in ids]
    nats, real, entropy, _ = judge(texts).values()
    return len(calls), seconds, nats, real, entropy


def table(folder):
    """Prints a row for each sampler of this model's process and each number of steps."""
    model, tokenizer, cfg, _ = load_model(f"{folder}/model.pt")
    judge = Judge(f"data/{cfg.dataset}")
    for name, settings in SETTINGS.items():
        if not name.startswith(cfg.process):
            continue
        for steps in STEPS:
            # masked takes no more steps than there are tokens, unless it takes some of them back
            if cfg.process == "masked" and "remask" not in settings and steps > cfg.block_size:
                break
            calls, *row = measure(model, judge, tokenizer, cfg.block_size, steps, settings)
            print(ROW.format(name, steps, calls, *row), flush=True)


def read(path):
    """The rows of such a table, lists of texts; the file may hold other text and tables as well."""
    rows = []
    with open(path, encoding="utf-8") as f:
        for line in f:
            row = line.strip("| \n").split(" | ")
            if row[0] in SETTINGS and len(row) == 7:
                rows.append(row)
    return rows


def plot(path, picture):
    """Draws likelihood and entropy of the samples against network calls."""
    from matplotlib import pyplot as plt
    rows = read(path)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    titles = {4: "5-gram nats/char (text: 1.67)", 6: "entropy of characters (text: 3.32)"}     # by column
    for ax, (column, title) in zip(axes, titles.items()):
        for name in dict.fromkeys(row[0] for row in rows):
            points = [(float(row[2]), float(row[column])) for row in rows if row[0] == name]
            style = "o-" if "embed" in name else "s--"
            ax.plot(*zip(*points), style, markersize=4, label=name)
        ax.set(xscale="log", xlabel="network calls", title=title, xticks=STEPS, xticklabels=STEPS)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    if sys.argv[1] == "plot":
        plot(*sys.argv[2:])
    else:
        print(HEAD)
        for folder in sys.argv[1:]:
            table(folder)
