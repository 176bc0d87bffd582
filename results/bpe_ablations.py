"""Trains with one choice of optimizer, head, loss or decay changed, through train.py as it is.

    python results/bpe_ablations.py prepare corpus corpus4k
    python results/bpe_ablations.py "separate head" --dataset=corpus4k --max_iters=600      # a variant below

Prints the variant's row: its bound. `prepare` makes of a dataset of byte pairs one in which the 4,095 most
frequent tokens keep apart and the rest is one more: so small a run hardly leaves the unigram entropy of all.
"""
import os
import sys

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data
import diffusion
import model
import optim


def prepare(source, target):
    train, val = (np.fromfile(f"data/{source}/{split}.bin", np.uint16) for split in ("train", "val"))
    frequent = np.argsort(-np.bincount(train, minlength=2 ** 16), kind="stable")[:4095]
    ids = np.full(2 ** 16, 4095, np.uint16)
    ids[frequent] = np.arange(4095)
    chars = "".join(chr(0x4E00 + i) for i in range(4096))                       # one sign for each
    meta = {"tokenizer": "chars", "chars": chars, "vocab_size": 4096, "source": source}
    data.write_dataset(target, ids[train], ids[val], meta)
    p = np.bincount(ids[train]) / len(train)
    print(f"unigram entropy {-(p * np.log(p)).sum():.4f}, rest {p[4095]:.1%}")


class OnTheBound(diffusion.Masked):
    """A masked token weighs 1/k: the loss is the bound itself."""

    def forward(self, x0, t):
        return self.nelbo(x0, t).mean()


class Separate(diffusion.Masked):
    """A matrix of its own for the head, in place of the input embedding's."""

    def __init__(self, cfg, V):
        super().__init__(cfg, V)
        self.head = model.Linear(cfg.n_embd, V)
        torch.nn.init.normal_(self.stem.weight)

    def denoise(self, xt, t, at=None):
        h = self.net(self.stem(xt), t)
        return self.head(h if at is None else h.flatten(0, 1).index_select(0, at)).float() + self.bias


def adamw(net, cfg):
    """AdamW for the matrices of the blocks, too, at learning_rate."""
    muon, adam = configure_optimizers(net, cfg)
    matrices = muon.param_groups[0]["params"]
    return [torch.optim.AdamW(matrices, lr=1, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay,
                              fused=True), adam]


CLASSES = {"on the bound": OnTheBound, "separate head": Separate}
configure_optimizers = optim.configure_optimizers

if __name__ == "__main__":
    name, *flags = sys.argv[1:]
    if name == "prepare":
        sys.exit(prepare(*flags))
    diffusion.PROCESSES["masked"] = CLASSES.get(name, diffusion.Masked)
    if name == "adamw":
        optim.configure_optimizers = adamw
    with open(os.path.join(ROOT, "train.py")) as f:
        source = f.read()
    if name == "cosine decay":
        line = "    decay = (cfg.max_iters - step) / (0.6 * cfg.max_iters)\n"
        assert line in source
        source = source.replace(line, "    decay = 0.5 + 0.5 * math.cos(math.pi * step / cfg.max_iters)\n")
    elif name not in ("as it is", "adamw", *CLASSES):
        sys.exit(f"error: there is no variant {name!r}")
    sys.argv = ["train.py", "--eval_interval=1000000", *flags]
    ran = {"__name__": "__main__", "__file__": os.path.join(ROOT, "train.py")}
    exec(compile(source, "train.py", "exec"), ran)  # noqa: S102 (our own file)
    print("ROW {} {}: bound {:.4f} ± {:.4f}".format(name, " ".join(flags), *ran["evaluate"]()))
