"""Speed of a training step and of sampling, for both processes and a causal GPT of the same size, in one run.

    python bench.py                                                      # the laptop's settings
    python bench.py config/owt_masked.py --gradient_accumulation_steps=2 --dataset=synthetic

The settings are train.py's, but all processes are measured. The dataset synthetic is made of random tokens of
GPT-2's vocabulary. A step is all that train.py does in one: batches, forward and backward pass, clipping,
optimizers, average. GiB are those of the model on a GPU, and on a CPU those of the whole program so far. Not for
Windows, which has no getrusage.
"""
import copy
import sys
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

# What a GPU multiplies in bfloat16 at best, in TFLOP/s, without sparsity. The first name that fits counts.
PEAKS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "B200": 2250,
    "A100": 312,
    "A10": 125,
    "L40S": 362,
    "L4": 121,
    "5090": 209,
    "4090": 165,
    "3090": 71,
}
GIB = 2 ** 30


class Causal(Masked):
    """A GPT made of the same parts: each position sees what is before it, and learns the next token."""

    def __init__(self, cfg, V):
        super().__init__(cfg, V)
        for block in self.net.blocks:
            block.causal = True

    def forward(self, x0, t):
        where = torch.ones_like(x0, dtype=torch.bool)
        where[:, -1] = False                            # nothing comes after the last token
        logits = self.denoise(x0, where)
        return F.cross_entropy(logits, x0[:, 1:].flatten())


# ---- settings, and tokens to train on

cfg = hardware(load(Config))
torch._dynamo.config.capture_dynamic_output_shape_ops = True    # as train.py does
torch.set_float32_matmul_precision("high")
A, B, T = cfg.gradient_accumulation_steps, cfg.batch_size, cfg.block_size
on_cuda = "cuda" in cfg.device
if cfg.dataset == "synthetic":
    V = 50304
    tokens = np.random.default_rng(0).integers(0, 50257, 2 ** 20).astype(np.uint16)
else:
    meta, splits = load_data(cfg.dataset, T)
    V = Tokenizer(meta).V
    tokens = splits["train"]
chip = torch.cuda.get_device_name() if on_cuda else f"{torch.get_num_threads()} CPU threads"
print(f"{chip}, torch {torch.__version__}, {cfg.dtype}{', compiled' * cfg.compile}; {cfg.n_layer} layers x "
      f"{cfg.n_embd}, V = {V:,}; a step is {A} x {B} x {T} = {A * B * T:,} tokens")

# ---- what is measured


def batch(rng, t):
    """Random crops (B, T) and their times t (B,), on the device."""
    x0 = crops(tokens, rng, B, T)
    return x0.to(cfg.device), t.to(cfg.device)


def train(model, ema, optimizers, n):
    """Takes n steps; returns the seconds of one."""
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    for _ in range(n):
        for t in times(rng, A, B, bell=True):
            loss = model(*batch(rng, t)) / A
            loss.backward()
        update(model, ema, optimizers, cfg.grad_clip, cfg.ema_decay)
    loss.item()                                         # waits for the device
    return (time.perf_counter() - start) / n


def work_of(model):
    """FLOP of the matrix products in forward and backward pass, for each token."""
    rng = np.random.default_rng(0)
    x0, t = batch(rng, times(rng, 1, B)[0])
    # attention is counted when it is written out
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x0, t).backward()
    model.zero_grad()
    return counter.get_total_flops() / (B * T)


def sampling(model, n, **settings):
    """Tokens/s of n samples of a block in 32 calls of the network."""
    known = torch.zeros(n, T, dtype=torch.bool, device=cfg.device)
    unknown = known.long()
    list(model.sample(unknown, known, 2, **settings))   # the first calls are slow
    start = time.perf_counter()
    *_, (x, _) = model.sample(unknown, known, 32, **settings)
    x.tolist()                                          # waits for the device
    speed = n * T / (time.perf_counter() - start)
    return f"{speed:,.0f} tokens/s for batch {n}"


# ---- training

trainers = {}               # model, its average and its optimizers, by name
work = {}                   # FLOP a token
memory = {}                 # bytes at most
seconds = {}                # of a step, in each round
for name, kind in {"masked": Masked, "embed": Embed, "causal GPT": Causal}.items():
    before = torch.cuda.memory_allocated() if on_cuda else 0
    torch.manual_seed(cfg.seed)
    model = kind(cfg, V).to(cfg.device)
    ema = copy.deepcopy(model)
    work[name] = work_of(model)
    trainers[name] = model, ema, configure_optimizers(model, cfg)
    if cfg.compile:
        model.compile()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    train(*trainers[name], 3)                           # the first steps are slow
    seconds[name] = [train(*trainers[name], 1)]
    if on_cuda:
        memory[name] = torch.cuda.max_memory_allocated() - before
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        memory[name] = unit * getrusage(RUSAGE_SELF).ru_maxrss

# the models take turns, so that what else runs on the machine slows down all of them
for _ in range(9):
    for name, trainer in trainers.items():
        n = max(1, int(0.3 / seconds[name][0]))         # steps that take .3 s together
        seconds[name].append(train(*trainer, n))

words = chip.replace("-", " ") + " "                    # of names such as NVIDIA A100-SXM4-80GB
peaks = [peak for part, peak in PEAKS.items() if f"{part} " in words]
print(f"{'':12}{'ms/step':>9}{'quartiles':>17}{'tokens/s':>12}{'GFLOP/token':>13}{'GiB':>7}   TFLOP/s (MFU)")
for name in trainers:
    low, middle, high = np.quantile(seconds[name], (0.25, 0.5, 0.75))
    speed = A * B * T / middle
    done = speed * work[name] / 1e12
    mfu = f" ({done / peaks[0]:.1%})" if peaks and cfg.dtype == "bfloat16" else ""
    print(f"{name:12}{1e3 * middle:9.1f}{1e3 * low:8.1f}-{1e3 * high:<8.1f}{speed:12,.0f}"
          f"{work[name] / 1e9:13.3f}{memory[name] / GIB:7.2f}{done:10.3f}{mfu}")

# ---- sampling, one sample at a time and many at once

many = min(32, max(1, 2 ** 28 // (T * V)))              # the logits of all their tokens take 1 GiB
for name, settings in ("masked", {}), ("masked", {"order": "confidence"}), ("embed", {}):
    ema = trainers[name][1]
    speeds = [sampling(ema, n, **settings) for n in (1, many)]
    print(f"{name} sampling, {settings.get('order', '32 steps')}: {', '.join(speeds)}")
