"""Speed of a training step and of sampling, for both processes and a causal GPT of the same size, in one run.

    python bench.py                                                      # the laptop's settings
    python bench.py config/owt_masked.py --gradient_accumulation_steps=2 --dataset=synthetic

Settings are train.py's, process aside. dataset synthetic: random tokens of GPT-2's vocabulary. A step is all
of train.py's: batches, forward, backward, clipping, optimizers, average. GiB on a CPU: of the program so far.
"""
import copy
import time
from resource import RUSAGE_SELF, getrusage

import numpy as np
import torch
import torch.nn.functional as F

from config import Config, hardware, load
from data import Tokenizer, crops, load_bin, load_meta
from diffusion import Embed, Masked, times
from optim import configure_optimizers, peak_flops, update


class Causal(Masked):
    """A GPT made of the same parts: each position sees what is before it, and learns the next token."""

    def __init__(self, cfg, V):
        super().__init__(cfg, V)
        for block in self.net.blocks:
            block.attention = self.attention

    @staticmethod
    def attention(q, k, v):                                 # written out where model.py does so
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            later = torch.full((q.size(2), q.size(2)), -torch.inf, dtype=q.dtype).triu(1)
            return (q * q.size(-1) ** -0.5 @ k.transpose(-1, -2) + later).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def flops(self, T):                                     # the head everywhere, and half of the attention
        return super().flops(T) + 3 * self.stem.embedding_dim * (self.V - 2 * len(self.net.blocks) * T)

    def forward(self, x0, t):
        return F.cross_entropy(self.denoise(x0, t)[:, :-1].flatten(0, 1), x0[:, 1:].flatten())


def train(model, ema, optimizers, n):
    """Takes n steps; returns the seconds of one."""
    rng, start = np.random.default_rng(0), time.perf_counter()
    for _ in range(n):
        for t in times(rng, A, B):
            batch = (x.pin_memory() if gpu else x for x in (crops(tokens, rng, B, T), t))
            loss = model(*(x.to(cfg.device, non_blocking=True) for x in batch)) / A
            loss.backward()
        update(model, ema, optimizers, cfg.grad_clip, cfg.ema_decay)
    loss.item()                                             # waits for the device
    return (time.perf_counter() - start) / n


def sampling(model, n, steps=32, **settings):
    """Tokens/s of n samples of a block, and on a CPU the share of that time that the loop itself takes."""
    known, denoise, network = torch.zeros(n, T, dtype=torch.bool, device=cfg.device), model.denoise, []

    def timed(*args, **kwargs):
        start = time.perf_counter()
        logits = denoise(*args, **kwargs)
        network.append(time.perf_counter() - start)
        return logits

    list(model.sample(known.long(), known, 2, **settings))  # warms up
    model.denoise, start = timed, time.perf_counter()
    list(model.sample(known.long(), known, steps, **settings))[-1][0].tolist()
    seconds, model.denoise = time.perf_counter() - start, denoise
    own = "" if gpu else f" ({1 - sum(network) / seconds:.0%} of it the loop's own work)"
    return f"{n * T / seconds:,.0f} tokens/s{own} for batch {n}"


cfg = hardware(load(Config))
gpu, A, B, T = "cuda" in cfg.device, cfg.gradient_accumulation_steps, cfg.batch_size, cfg.block_size
if cfg.dataset == "synthetic":
    V, tokens = 50304, np.random.default_rng(0).integers(0, 50257, 2 ** 20).astype(np.uint16)
else:
    meta = load_meta(cfg.dataset)
    V, tokens = Tokenizer(meta).V, load_bin(cfg.dataset, "train", meta["vocab_size"], cfg.block_size)
chip = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
print(f"{chip}, torch {torch.__version__}, {cfg.dtype}{', compiled' * cfg.compile}; {cfg.n_layer} layers x "
      f"{cfg.n_embd}, V = {V:,}; a step is {A} x {B} x {T} = {A * B * T:,} tokens")
trainers, seconds, used = {}, {}, {}
for name, kind in {"masked": Masked, "embed": Embed, "causal GPT": Causal}.items():
    base = torch.cuda.memory_allocated() if gpu else 0
    torch.manual_seed(cfg.seed)
    model = kind(cfg, V).to(cfg.device)
    trainers[name] = model, copy.deepcopy(model), configure_optimizers(model, cfg)
    if cfg.compile:
        model.compile()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds[name] = [train(*trainers[name], 1) for _ in range(4)][3:]  # the first are slow
    used[name] = torch.cuda.max_memory_allocated() - base if gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
for name in [*trainers] * 9:                                # in turns, for fairness: steps that fit into .3 s
    seconds[name].append(train(*trainers[name], max(1, int(0.3 / seconds[name][0]))))
print(f"{'':12}{'ms/step':>9}{'quartiles':>17}{'tokens/s':>12}{'GFLOP/token':>13}{'GiB':>7}   TFLOP/s (MFU)")
for name, (model, *_) in trainers.items():
    low, middle, high = np.quantile(seconds[name], (0.25, 0.5, 0.75))
    speed, work = A * B * T / middle, model.flops(T)
    mfu = f" ({speed * work / peak_flops(chip):.1%})" if cfg.dtype == "bfloat16" and peak_flops(chip) else ""
    print(f"{name:12}{1e3 * middle:9.1f}{1e3 * low:8.1f}-{1e3 * high:<8.1f}{speed:12,.0f}{work / 1e9:13.3f}"
          f"{used[name] / 2 ** 30:7.2f}{speed * work / 1e12:10.3f}{mfu}")
many = min(32, max(1, 2 ** 28 // (T * V)))                  # the logits of all their tokens take 1 GiB
for name, settings in ("masked", {}), ("masked", {"order": "confidence"}), ("embed", {}):
    print(f"{name} sampling, {settings.get('order', '32 steps')}: "
          + ", ".join(sampling(trainers[name][1], n, **settings) for n in (1, many)))
