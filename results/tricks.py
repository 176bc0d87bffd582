"""What each trick gives a training step: with it, and without, in turns in one process.

    python results/tricks.py                        # 50,304 tokens; flags of train.py follow
    python results/tricks.py --compile=True

Prints the time of a step of each variant relative to the code as it is, with quartiles.
"""
import contextlib
import copy
import os
import sys
import time
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import model
from config import Config, hardware, load
from diffusion import Embed, Masked, places, times
from optim import configure_optimizers, update

ROUNDS = 9


class HeadEverywhere(Masked):
    """Logits of all positions, of which the masked ones count."""

    def denoise(self, xt, t, at=None):
        return super().denoise(xt, t)


class Chunks(Masked):
    """Cross-entropy in pieces of 128 positions, whose logits the backward pass computes again."""

    def losses(self, x0, t):
        def piece(h, y):
            logits = F.linear(h, self.stem.weight[:self.V].to(h.dtype)).float() + self.bias
            return F.cross_entropy(logits, y, reduction="none")

        xt, k = self.corrupt(x0, t), self.count(t, x0.size(1))
        at = places(xt == self.V, x0.size(0) * (x0.size(1) + 1) // 2)
        h = self.net(self.stem(xt), k / x0.size(1)).flatten(0, 1)[at]
        nll = [torch.utils.checkpoint.checkpoint(piece, *part, use_reentrant=False)
               for part in zip(h.split(128), x0.flatten()[at].split(128))]
        return k, at // x0.size(1), torch.cat(nll)


class FirstBySoftmax(Embed):
    """The first look by a softmax over all tokens instead of attention over the table."""

    def first(self, xt, t, known=None):
        return self.estimate((self.query(xt, t) @ self.table().T + self.bias).detach(), xt, known)


class SecondAtHalf(Embed):
    FIRST_EVERY = 2


class NoSecond(Embed):
    FIRST_EVERY = 1


def torch_muon(net, cfg):
    """torch.optim.Muon, one matrix after the other."""
    ours, adam = configure_optimizers(net, cfg)
    matrices = ours.param_groups[0]["params"]
    return [torch.optim.Muon(matrices, lr=cfg.learning_rate, weight_decay=cfg.weight_decay), adam]


class Trainer:
    """A process with its optimizers, at V tokens; patches are what it changes in model.py."""

    def __init__(self, kind, V=50304, patches=None, optimizers=configure_optimizers):
        torch.manual_seed(0)
        self.net, self.V, self.patches, self.seconds = kind(cfg, V), V, patches or {}, []
        self.optimizers, self.average = optimizers(self.net, cfg), copy.deepcopy(self.net)
        if cfg.compile:
            self.net.compile()

    def step(self):
        rng = np.random.default_rng(len(self.seconds))
        x0 = torch.from_numpy(rng.integers(0, 50257, (cfg.batch_size, cfg.block_size)))
        start = time.perf_counter()
        with mock.patch.multiple(model, **self.patches) if self.patches else contextlib.nullcontext():
            self.net(x0, times(rng, 1, cfg.batch_size)[0]).backward()
        update(self.net, self.average, self.optimizers, cfg.grad_clip, cfg.ema_decay)
        self.seconds.append(time.perf_counter() - start)


cfg = hardware(load(Config, ["--batch_size=8", "--embed_dim=32", "--device=cpu", *sys.argv[1:]]))
print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {cfg.dtype}"
      f"{', compiled' if cfg.compile else ''}; {cfg.n_layer} layers x {cfg.n_embd}, {cfg.batch_size} x "
      f"{cfg.block_size} tokens; time of a step relative to the first row, quartiles")
for group in ({"masked, as it is": (Masked,), "head at every position": (HeadEverywhere,),
               "cross-entropy in chunks of 128": (Chunks,), "V = 50,257, not padded": (Masked, 50257),
               "F.rms_norm": (Masked, 50304, {"norm": lambda x: F.rms_norm(x, x.shape[-1:])}),
               "torch.optim.Muon": (Masked, 50304, None, torch_muon)},
              {"embed, as it is": (Embed,), "first look by softmax": (FirstBySoftmax,),
               "second look at half of the rows": (SecondAtHalf,),
               "no second look": (NoSecond,), "V = 50,257, not padded": (Embed, 50257)}):
    trainers = {name: Trainer(*arguments) for name, arguments in group.items()}
    for trainer in [*trainers.values()] * (2 + ROUNDS):                         # the first two warm up
        trainer.step()
    seconds = {name: np.array(trainer.seconds[2:]) for name, trainer in trainers.items()}
    for name, times_of in seconds.items():
        low, median, high = np.quantile(times_of, (0.25, 0.5, 0.75)) / np.median(next(iter(seconds.values())))
        print(f"{name:32}{median:6.2f}{low:8.2f}-{high:.2f}", flush=True)
