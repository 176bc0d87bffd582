"""Plots the bound against steps: python results/plot_loss.py assets/loss.png NAME=log.csv NAME=log.csv"""
import csv
import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

path, *logs = sys.argv[1:]
figure, ax = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
for log in logs:
    name, file = log.split("=")
    with open(file, newline="") as f:
        rows = list(csv.DictReader(f))
    ax.plot([int(row["step"]) for row in rows], [float(row["val_nelbo"]) for row in rows], "o-", markersize=3,
            label=f"{name}: {rows[-1]['val_nelbo']}")
ax.set(xlabel="steps", ylabel="bound, nats/token")
ax.grid(alpha=0.3)
ax.legend()
figure.savefig(path, dpi=110)
