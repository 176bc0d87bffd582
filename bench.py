"""Speed of a training step and of sampling, for both processes and a causal GPT of the same size, in one run.

    python bench.py                                                      # the laptop's settings
    python bench.py config/owt_masked.py --gradient_accumulation_steps=2 --dataset=synthetic
    python bench.py --dataset=synthetic --batch_size=4 --compile=True

Settings are those of train.py; process is ignored. dataset synthetic is random tokens of GPT-2's vocabulary.
A step is what train.py does between two readings of the clock: batches, forward, backward, clipping,
optimizers, average. The models take turns, so that a noisy machine is unfair to none.
"""
import copy
import os
import resource
import time

import numpy as np
import torch
import torch.nn.functional as F

from config import Config, hardware, load
from data import Tokenizer, crops, load_bin, load_meta
from diffusion import Embed, Masked, times
from optim import configure_optimizers, peak_flops, update

ROUNDS, ROUND_SECONDS = 9, 0.3              # each round of each model: as many steps as fit, at least one


def causal_attention(q, k, v):
    """attention() of model.py, each position seeing what is before it."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    scores = q * q.size(-1) ** -0.5 @ k.transpose(-1, -2)
    return scores.masked_fill(scores.new_ones(scores.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1) @ v


class Causal(Masked):
    """A GPT made of the same parts: the loss of the next token at every position."""

    def __init__(self, cfg, V):
        super().__init__(cfg, V)
        for block in self.net.blocks:
            block.attention = causal_attention

    def flops(self, T):
        attention = 4 * len(self.net.blocks) * T * self.net.table.size(2)       # half of it is computed
        return 3 * (self.net.flops(T) - attention / 2 + 2 * self.V * self.stem.embedding_dim)

    def forward(self, x0, t):
        logits = self.denoise(x0, t)[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, x0[:, 1:].flatten())


class Trainer:
    """A model with its optimizers, and its times."""

    def __init__(self, kind):
        torch.manual_seed(cfg.seed)
        self.model = kind(cfg, V).to(cfg.device)
        self.ema = copy.deepcopy(self.model)
        self.optimizers = configure_optimizers(self.model, cfg)
        if cfg.compile:
            self.model.compile()
        self.seconds, self.flops = [], self.model.flops(T) * n_step

    def step(self):
        rng = np.random.default_rng(len(self.seconds))
        for t in times(rng, A, B):
            x0 = crops(tokens, rng, B, T)
            if on_cuda:
                x0, t = x0.pin_memory(), t.pin_memory()
            loss = self.model(x0.to(cfg.device, non_blocking=True), t.to(cfg.device, non_blocking=True)) / A
            loss.backward()
        update(self.model, self.ema, self.optimizers, cfg.grad_clip, cfg.ema_decay)
        return loss

    def round(self):
        n = max(1, int(ROUND_SECONDS / self.seconds[0])) if self.seconds else 1
        start = time.perf_counter()
        for _ in range(n):
            loss = self.step()
        loss.item()                                         # waits for the device
        self.seconds.append((time.perf_counter() - start) / n)

    def sampling(self, n, steps=32, **settings):
        """n samples of block_size tokens at a time, as text: tokens/s, and the share of the time that is the
        sampling loop's own (on a CPU; a GPU works on while the loop runs)."""
        known, denoise, network = torch.zeros(n, T, dtype=torch.bool, device=cfg.device), self.ema.denoise, []

        def timed(*args, **kwargs):
            start = time.perf_counter()
            logits = denoise(*args, **kwargs)
            network.append(time.perf_counter() - start)
            return logits

        self.ema.denoise = timed
        for _ in range(2):                                  # the first warms up
            network.clear()
            start = time.perf_counter()
            *_, (x, _) = self.ema.sample(known.long(), known, steps, **settings)
            x.tolist()
            seconds = time.perf_counter() - start
        self.ema.denoise = denoise
        own = "" if on_cuda else f" ({1 - sum(network) / seconds:.0%} of it the loop's own work)"
        return f"{n * T / seconds:,.0f} tokens/s{own} for batch {n}"


cfg = hardware(load(Config))
on_cuda = "cuda" in cfg.device
if cfg.dataset == "synthetic":
    V, tokens = 50304, np.random.default_rng(0).integers(0, 50257, 2 ** 20).astype(np.uint16)
else:
    meta = load_meta(cfg.dataset)
    V, tokens = Tokenizer(meta).V, load_bin(cfg.dataset, "train", meta["vocab_size"], cfg.block_size)
A, B, T = cfg.gradient_accumulation_steps, cfg.batch_size, cfg.block_size
n_step = A * B * T
cores = f"{torch.get_num_threads()} of {os.cpu_count()} CPU threads"
chip = torch.cuda.get_device_name() if on_cuda else cores
print(f"{chip}, torch {torch.__version__}, {cfg.dtype}{', compiled' if cfg.compile else ''}; {cfg.n_layer} "
      f"layers x {cfg.n_embd}, V = {V:,}; a step is {A} x {B} x {T} = {n_step:,} tokens")

trainers, memory = {}, {}
for name, kind in {"masked": Masked, "embed": Embed, "causal GPT": Causal}.items():
    before = torch.cuda.memory_allocated() if on_cuda else 0
    trainers[name] = trainer = Trainer(kind)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):                                      # the compiler's time, and the first, slow steps
        trainer.step().item()
    memory[name] = (torch.cuda.max_memory_allocated() - before if on_cuda
                    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2 ** 30
for _ in range(ROUNDS):
    for trainer in trainers.values():
        trainer.round()

note = "" if on_cuda else "(memory: the most the whole program ever had, up to that row)"
print(f"{'':12}{'ms/step':>9}{'quartiles':>17}{'tokens/s':>12}{'GFLOP/token':>13}{'TFLOP/s':>9}{'MFU':>8}"
      f"{'GiB':>7}  {note}")
for name, trainer in trainers.items():
    low, seconds, high = np.quantile(trainer.seconds, (0.25, 0.5, 0.75))
    peak = peak_flops(chip)
    print(f"{name:12}{1e3 * seconds:9.1f}{1e3 * low:8.1f}-{1e3 * high:<8.1f}{n_step / seconds:12,.0f}"
          f"{trainer.flops / n_step / 1e9:13.3f}{trainer.flops / seconds / 1e12:9.3f}"
          f"{f'{trainer.flops / seconds / peak:8.1%}' if peak else '       -'}{memory[name]:7.2f}")
for name, settings in ("masked", {}), ("masked", {"order": "confidence"}), ("embed", {}):
    print(f"{name} sampling, {settings.get('order', '32 steps')}: "
          + ", ".join(trainers[name].sampling(n, **settings) for n in (1, 32)))
