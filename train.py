"""Trains a diffusion language model.

    python train.py                                              # laptop size, for 2 CPU cores
    torchrun --nproc_per_node=3 train.py config/owt_masked.py    # GPT-2's size, three GPUs
    python train.py --init_from=resume                           # goes on from out/ckpt.pt, exactly
    python train.py --init_from=out/model.pt --eval_only=True    # the bound of a model

A step: crops of the data -> model(x0, t), which is the loss -> gradients -> Muon and AdamW -> the average.

What a step computes doesn't depend on the number of processes, and no random state needs to be saved:
micro-batch m of step s draws its crops, noise and dropout from generators seeded with (seed, s, m).
"""
import copy
import ctypes
import gc
import math
import os
import shlex
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import prepare_shakespeare
from config import Config, fail, hardware, load
from data import Tokenizer, crops, load_checkpoint, load_data, load_weights, save_checkpoint
from diffusion import PROCESSES, times
from optim import configure_optimizers, update

# ---- memory: glibc keeps what a step frees, for the next one, which then takes .92 of the CPU time

if sys.platform == "linux":
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)                       # musl has none
    if mallopt and mallopt(-3, 2 ** 30):    # M_MMAP_THRESHOLD; where glibc refuses that, it adapts by itself
        mallopt(-1, 2 ** 31 - 1)            # M_TRIM_THRESHOLD

# ---- settings: a run that starts from a checkpoint uses those of the checkpoint; flags override them

sys.stdout.reconfigure(line_buffering=True, errors="replace")                   # · or 世 where there is none
nowhere = open(os.devnull, "w")             # noqa: SIM115 (open to the end)
cfg = load(Config)
ckpt_path = f"{cfg.out_dir}/ckpt.pt"        # all that it takes to go on
model_path = f"{cfg.out_dir}/model.pt"      # the averaged weights with the best bound so far
if cfg.init_from == "auto":
    cfg.init_from = "resume" if os.path.exists(ckpt_path) else "scratch"
resume = cfg.init_from == "resume"
start = ckpt_path if resume else cfg.init_from
ckpt = load_checkpoint(start) if start != "scratch" else {}
cfg = load(Config, defaults=ckpt.get("config"))
go_on = f"--init_from=resume --out_dir={shlex.quote(cfg.out_dir)}"
for path in ckpt_path, model_path:
    if os.path.exists(path) and not resume and not cfg.eval_only:
        fail(f"{path} is of another run: go on with {go_on}, pass another --out_dir, or delete it")
# what checkpoints keep, before hardware() decides what "auto" means on this machine
kept = {name: value for name, value in vars(cfg).items() if name not in ("out_dir", "init_from", "eval_only")}
hardware(cfg)

# ---- processes: one alone, or one of many under torchrun

rank = int(os.environ.get("RANK", "0"))
world = int(os.environ.get("WORLD_SIZE", "1"))
master = rank == 0
saving = master and not cfg.eval_only
# A micro-batches in a step of all processes, B sequences in each, T tokens in a sequence
A, B, T = cfg.gradient_accumulation_steps, cfg.batch_size, cfg.block_size
if A % world:
    fail(f"gradient_accumulation_steps is {A}: it must be a multiple of the {world} processes")
if cfg.n_embd % (2 * cfg.n_head):
    fail(f"n_embd is {cfg.n_embd}: n_head {cfg.n_head} needs a multiple of {2 * cfg.n_head}")
if world > 1:
    dist.init_process_group()               # gloo for what is on CPUs, NCCL for what is on GPUs


def say(text):
    """Prints above the progress bar. A closed pipe or terminal doesn't end the run: it goes on in silence."""
    try:
        if master:
            tqdm.write(text)
    except OSError:
        sys.stdout = nowhere


def total(tensor, op=dist.ReduceOp.SUM):
    """The sum of a tensor over all processes, or what another op makes of them."""
    if world > 1:
        dist.all_reduce(tensor, op)
    return tensor


# A signal only makes a note. Between two micro-batches all processes look whether one of them has got any.
signals = [0]


def note(number, frame):
    signals.append(number)
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # a second Ctrl-C ends the program at once


# Ctrl-C, a scheduler's stop, and a closed terminal, which Windows has no signal for
for number in signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT):
    if signal.getsignal(number) != signal.SIG_IGN:      # nohup ignores it, and so do we
        signal.signal(number, note)


def my_share(n):
    """Yields this process's numbers out of 0 ... n - 1. After a signal it stops all processes at one place."""
    for first in range(0, n, world):
        number = total(torch.tensor(max(signals)), dist.ReduceOp.MAX)
        if number:
            signals.append(number.item())               # maybe another process's
            raise KeyboardInterrupt
        if first + rank < n:
            yield first + rank


# ---- data

if master:
    prepare_shakespeare.first_use(cfg.dataset)
total(torch.zeros(1))                       # the other processes wait here until it is prepared
meta, splits = load_data(cfg.dataset, T)
tokenizer = Tokenizer(meta)


def batch(split, t, *key):
    """Random crops x0 (B, T) and their times t (B,), on the device.

    The numbers in key seed the crops, and also the noise and the dropout of what is computed next.
    """
    rng = np.random.default_rng((0, *key))              # (1, *key) is for the times
    x0 = crops(splits[split], rng, B, T)
    torch.manual_seed(int(rng.integers(2 ** 63)))
    return x0.to(cfg.device), t.to(cfg.device)


# ---- model, averaged model, optimizers

torch.manual_seed(cfg.seed)
torch.set_float32_matmul_precision("high")              # TF32 on CUDA
model = PROCESSES[cfg.process](cfg, tokenizer.V).to(cfg.device)
# logits start at the tokens' log-frequencies, which need no learning; ids that only pad V never come
n_ids = meta["vocab_size"]
counts = np.bincount(splits["train"][:10_000_000], minlength=n_ids) + 1
model.bias.data.fill_(-1e30)
model.bias.data[:n_ids] = torch.from_numpy(np.log(counts / counts.sum()))
ema = copy.deepcopy(model).eval().requires_grad_(False)
optimizers = configure_optimizers(model, cfg)
step = 0
log = {}                                    # the rows of log.csv, by step
# what a bound was measured on: it compares with others that were measured on the same
val_batches = [meta["checksum"], B, T, cfg.eval_iters]

if ckpt:
    was = ckpt["config"]
    changes = [f"{name} {value} (was {was[name]})" for name, value in kept.items() if value != was.get(name, value)]
    if resume and ckpt["meta"] != meta:
        changes.append(f"data/{cfg.dataset} is not the same")
    say(f"settings are those of {start}, step {ckpt['step']}{', but ' * bool(changes)}{', '.join(changes)}")
    if ckpt["meta"].get("chars") != meta.get("chars"):
        fail(f"{start} was trained with another vocabulary than that of data/{cfg.dataset}")
    load_weights(model, ckpt["model"], start)
    load_weights(ema, ckpt.get("ema", ckpt["model"]), start)
    if resume or cfg.eval_only:
        step = ckpt["step"]
if resume and not cfg.eval_only:
    for optimizer, state in zip(optimizers, ckpt["optimizers"]):
        state["param_groups"] = optimizer.state_dict()["param_groups"]          # the settings of this run
        optimizer.load_state_dict(state)
    log = ckpt["log"]
    if step >= cfg.max_iters:
        say(f"max_iters is {cfg.max_iters}, so no step is left: a larger --max_iters trains on")
del ckpt
if cfg.compile:
    torch._dynamo.config.capture_dynamic_output_shape_ops = True                # masked: K changes
    torch._dynamo.config.optimize_ddp = False           # one graph, as on one device: or dropout differs
    model.compile()
net = DistributedDataParallel(model) if world > 1 else model

n_params = sum(p.numel() for p in model.parameters())
say(f"{cfg.process} diffusion on {cfg.device} x {world}, {cfg.dtype}{', compiled' * cfg.compile}: "
    f"{n_params / 1e6:.2f} M parameters\n"
    f"data/{cfg.dataset}: {len(splits['train']):,} tokens to train on, {len(splits['val']):,} to validate, "
    f"vocabulary {tokenizer.V:,}; source: {meta['source']}\n"
    f"a step is {A * B * T:,} tokens; {cfg.max_iters:,} steps are "
    f"{cfg.max_iters * A * B * T / len(splits['train']):.1f} epochs")

# ---- evaluation: the averaged weights, on the same crops and noise each time, dealt to all processes

LEVELS = 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95


@torch.no_grad()
def evaluate():
    """The bound on the validation split and its s.e., in nats/token; names of measures, and a row for each level."""
    bounds = torch.zeros(cfg.eval_iters, dtype=torch.float64)
    for i in my_share(cfg.eval_iters):
        rng = np.random.default_rng((1, i))
        t = times(rng, 1, B)[0]                                                 # (B,)
        bounds[i] = ema.nelbo(*batch("val", t, i)).mean()
    total(bounds)
    nelbo = bounds.mean().item()
    se = bounds.std() / cfg.eval_iters ** 0.5
    n = max(1, cfg.eval_iters // 8)         # batches for each row
    names = list(ema.measures(*batch("val", torch.rand(B), 0)))
    rows = torch.zeros(len(LEVELS), len(names), dtype=torch.float64)
    for row, t in zip(rows, LEVELS):
        for i in my_share(n):
            measures = ema.measures(*batch("val", torch.full((B,), t), i))
            row += torch.stack(list(measures.values())).cpu() / n
    return nelbo, se, names, total(rows)


def report(nelbo, se, names, rows):
    """Prints what evaluate() found."""
    line = f"step {step}: val nelbo {nelbo:.4f} ± {se:.4f} nats/token"
    if "val_chars" in meta:
        per_char = nelbo * meta["val_tokens"] / meta["val_chars"]
        line += f", {per_char:.4f} nats/char, {per_char / math.log(2):.3f} bits/char"
    if tokenizer.chars is None:
        line += f", perplexity <= {np.exp(nelbo):.2f}"
    say(line)
    say("     t" + "".join(f"{name:>15}" for name in names))
    for t, row in zip(LEVELS, rows):
        say(f"{t:6.2f}" + "".join(f"{value:15.4f}" for value in row))


def show_samples(n):
    torch.manual_seed(-1)                   # not cfg.seed: the noise would be the embeddings that it drew
    known = torch.zeros(n, T, dtype=torch.bool, device=cfg.device)
    *_, (tokens, _) = ema.sample(known.long(), known, steps=min(T, 128))
    for ids in tokens.tolist():
        say("-" * 80 + "\n" + tokenizer.decode(ids))
    say("-" * 80)


# ---- training


def save(nelbo=math.inf):
    """Whether it could write ckpt.pt and log.csv, and model.pt if nelbo is the lowest bound so far.

    A save that fails doesn't end the run, since the next evaluation tries again.
    """
    about = {"config": kept, "meta": meta, "step": step, "val_batches": val_batches}
    if not all(p.isfinite().all() for p in model.parameters()):
        say(f"the weights at step {step} aren't finite, so they aren't saved: lower the learning rates")
        return False
    try:
        save_checkpoint(ckpt_path, about | {
            "model": model.state_dict(), "ema": ema.state_dict(), "log": log,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
        best = load_checkpoint(model_path) if os.path.exists(model_path) else {"nelbo": math.inf}
        if nelbo < best["nelbo"] or nelbo < math.inf and best["val_batches"] != val_batches:
            save_checkpoint(model_path, about | {"model": ema.state_dict(), "nelbo": nelbo})
        with open(f"{cfg.out_dir}/log.csv", "w") as f:
            f.writelines(["step,train_loss,val_nelbo,se\n", *log.values()])
    except (OSError, SystemExit) as e:      # the latter if model.pt can't be read
        say(f"not saved at step {step}, so what was there before stays: {e}")
        return False
    return True


losses = []                                 # of the micro-batches since the last look, on the device
train_loss = log.get(step, ",").split(",")[1]           # their mean; nothing where no step was taken
saved = True                                # whether the last attempt to save worked
# a terminal shows the bar; elsewhere, as in a log file, it is printed once a minute
in_terminal = sys.stderr.isatty()
bar = tqdm(initial=step, total=cfg.max_iters, file=sys.stderr if saving and in_terminal else nowhere,
           unit=" tokens", unit_scale=A * B * T)
printed = time.time()
try:
    while True:
        last = step >= cfg.max_iters or cfg.eval_only
        if step % cfg.eval_interval == 0 or last:
            nelbo, se, names, rows = evaluate()
            log[step] = f"{step},{train_loss},{nelbo:.4f},{se:.4f}\n"
            if saving:
                saved = save(nelbo)                     # before printing, which may fail
            report(nelbo, se, names, rows)
            if saving:
                show_samples(4 if last else 1)
        if last:
            break

        # the rates: a linear warm-up, then the full ones, then a linear decay to zero over the last 60 % of the steps
        warmup = (step + 1) / max(1, cfg.warmup_iters)
        decay = (cfg.max_iters - step) / (0.6 * cfg.max_iters)
        for optimizer, lr in zip(optimizers, (cfg.learning_rate, cfg.adam_lr)):
            optimizer.param_groups[0]["lr"] = lr * min(1, warmup, decay)

        rng = np.random.default_rng((1, cfg.seed, step))
        t = times(rng, A, B, bell=True)                                         # (A, B)
        for m in my_share(A):
            net.require_backward_grad_sync = m + world >= A                     # DDP sums up in the last one
            loss = net(*batch("train", t[m], cfg.seed, step, m))
            (loss * world / A).backward()               # DDP takes the mean over the processes
            losses.append(loss.detach())
        step += 1
        keep = min(cfg.ema_decay, (1 + step) / (10 + step))                     # a shorter memory at first
        update(model, ema, optimizers, cfg.grad_clip, keep)

        if step % cfg.log_interval == 0:    # not in each step, since it waits for the GPU
            mean = total(torch.stack(losses).mean()).item() / world
            losses.clear()
            if not math.isfinite(mean):
                fail(f"loss {mean} at step {step}: lower the learning rates; that isn't saved")
            train_loss = f"{mean:.4f}"
            bar.set_postfix_str(f"step {step}, loss {train_loss}")
            if not in_terminal and time.time() > printed + 60:
                printed = time.time()
                say(str(bar))
        bar.update()
except KeyboardInterrupt:                   # from my_share(): each step is finished or hasn't changed anything
    if saving:
        saved = save()
        say(f"stopped at step {step}, {'saved' if saved else 'not saved'}: go on with {go_on}")
bar.close()
if world > 1:
    del net                                 # it holds the process group, whose threads must end before Python
    gc.collect()
    dist.destroy_process_group()
number = max(signals)
if number:                                  # end by the signal itself, so that shells and schedulers see it
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
if not saved:
    fail("the last attempt to save failed, see above")
