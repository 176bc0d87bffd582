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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import Config, hardware, load
from data import Tokenizer, crops, load_data
from diffusion import Embed, Masked, times
from optim import configure_optimizers, update

PEAKS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "B200": 2250, "A100": 312, "A10": 125,
         "L40S": 362, "L4": 121, "5090": 209, "4090": 165, "3090": 71}  # dense TFLOP/s in bfloat16

class Causal(Masked):
    """A GPT made of the same parts: each position sees what is before it, and learns the next token."""

    def __init__(self, cfg, V):
        super().__init__(cfg, V)
        for block in self.net.blocks:
            block.attention = self.attention

    @staticmethod
    def attention(q, k, v):                                 # written out where model.py does so
        if q.device.type != "cpu" or q.dtype != torch.bfloat16:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        later = torch.full((q.size(2), q.size(2)), -torch.inf, dtype=q.dtype).triu(1)
        return (q * q.size(-1) ** -0.5 @ k.transpose(-1, -2) + later).softmax(-1) @ v

    def forward(self, x0, t):
        return F.cross_entropy(self.denoise(x0, t)[:, :-1].flatten(0, 1), x0[:, 1:].flatten())

def train(model, ema, optimizers, n):
    """Takes n steps; returns the seconds of one."""
    torch.set_float32_matmul_precision("high")              # as train.py does
    rng, start = np.random.default_rng(0), time.perf_counter()
    for _ in range(n):
        for t in times(rng, A, B):
            batch = (x.pin_memory() if gpu else x for x in (crops(tokens, rng, B, T), t))
            loss = model(*(x.to(cfg.device, non_blocking=True) for x in batch)) / A
            loss.backward()
        update(model, ema, optimizers, cfg.grad_clip, cfg.ema_decay)
    loss.item()                                             # waits for the device
    return (time.perf_counter() - start) / n

def sampling(model, n, **settings):
    """Tokens/s of n samples of a block in 32 calls."""
    known = torch.zeros(n, T, dtype=torch.bool, device=cfg.device)
    list(model.sample(known.long(), known, 2, **settings))  # warms up
    start = time.perf_counter()
    list(model.sample(known.long(), known, 32, **settings))[-1][0].tolist()     # waits for the device
    return f"{n * T / (time.perf_counter() - start):,.0f} tokens/s for batch {n}"

cfg = hardware(load(Config))
gpu, A, B, T = "cuda" in cfg.device, cfg.gradient_accumulation_steps, cfg.batch_size, cfg.block_size
if cfg.dataset == "synthetic":
    V, tokens = 50304, np.random.default_rng(0).integers(0, 50257, 2 ** 20).astype(np.uint16)
else:
    meta, splits = load_data(cfg.dataset, cfg.block_size)
    V, tokens = Tokenizer(meta).V, splits["train"]
chip = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} CPU threads"
print(f"{chip}, torch {torch.__version__}, {cfg.dtype}{', compiled' * cfg.compile}; {cfg.n_layer} layers x "
      f"{cfg.n_embd}, V = {V:,}; a step is {A} x {B} x {T} = {A * B * T:,} tokens")
trainers, seconds, used, work = {}, {}, {}, {}
for name, kind in {"masked": Masked, "embed": Embed, "causal GPT": Causal}.items():
    base = torch.cuda.memory_allocated() if gpu else 0
    torch.manual_seed(cfg.seed)
    model = kind(cfg, V).to(cfg.device)
    x0, t = crops(tokens, np.random.default_rng(0), B, T), times(np.random.default_rng(0), 1, B)[0]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):     # counts matrix products
        model(x0.to(cfg.device), t.to(cfg.device)).backward()
    model.zero_grad()
    work[name] = counter.get_total_flops() / (B * T)        # FLOP a token
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
for name in trainers:
    low, middle, high = np.quantile(seconds[name], (0.25, 0.5, 0.75))
    speed, words = A * B * T / middle, chip.replace("-", " ") + " "     # NVIDIA A100-SXM4-80GB
    done, peak = speed * work[name] / 1e12, [peak for part, peak in PEAKS.items() if f"{part} " in words]
    mfu = f" ({done / peak[0]:.1%})" if peak and cfg.dtype == "bfloat16" else ""
    print(f"{name:12}{1e3 * middle:9.1f}{1e3 * low:8.1f}-{1e3 * high:<8.1f}{speed:12,.0f}"
          f"{work[name] / 1e9:13.3f}{used[name] / 2 ** 30:7.2f}{done:10.3f}{mfu}")
many = min(32, max(1, 2 ** 28 // (T * V)))                  # the logits of all their tokens take 1 GiB
for name, settings in ("masked", {}), ("masked", {"order": "confidence"}), ("embed", {}):
    print(f"{name} sampling, {settings.get('order', '32 steps')}: "
          + ", ".join(sampling(trainers[name][1], n, **settings) for n in (1, many)))
