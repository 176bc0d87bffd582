"""Trains a diffusion language model.

    python train.py                                              # laptop size, 6 to 10 minutes on 2 CPU cores
    python train.py config/shakespeare_masked.py --max_iters=2000
    torchrun --nproc_per_node=3 train.py config/shakespeare_masked.py --gradient_accumulation_steps=3
    python train.py --init_from=resume                           # goes on from out/ckpt.pt, exactly
    python train.py --init_from=out/model.pt --eval_only=True    # the bound of a model

What a step computes doesn't depend on the number of processes, and no random state needs to be saved:
micro-batch m of step s draws its crops, noise and dropout from generators seeded with (seed, s, m).
"""
import copy
import csv
import gc
import math
import os
import signal
import sys
import time
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import prepare_shakespeare
from config import Config, fail, hardware, load
from data import Tokenizer, crops, load_bin, load_checkpoint, load_meta, load_weights, save_checkpoint
from diffusion import PROCESSES, times
from optim import configure_optimizers, peak_flops, update

sys.stdout.reconfigure(line_buffering=True, errors="replace")
cfg = load(Config)

# ------------------------------------------------------------------------------------------------------------
# processes and device: alone, or one of many under torchrun

rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
if world > 1 and cfg.device != "cpu" and torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
cfg = hardware(cfg)
if cfg.gradient_accumulation_steps % world:
    fail(f"gradient_accumulation_steps is {cfg.gradient_accumulation_steps}, the micro-batches of a step "
         f"over all devices: it must be a multiple of the {world} processes")
on_cuda = "cuda" in cfg.device
if on_cuda:
    if world == 1:
        torch.cuda.set_device(torch.device(cfg.device).index or 0)
    cfg.device = f"cuda:{torch.cuda.current_device()}"
if world > 1:
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
master = rank == 0


def explain(kind, error, trace):
    """What happens to an error that nobody catches: one sentence where another process was lost."""
    if world > 1 and isinstance(error, RuntimeError) and "peer" in str(error):
        print(f"error: process {rank} lost another process of this run; when the cause is mended, "
              f"--init_from=resume goes on from the last checkpoint in {cfg.out_dir}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = explain


def total(tensor):
    """The sum of a tensor over all processes."""
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


# ------------------------------------------------------------------------------------------------------------
# data

if cfg.dataset == "shakespeare" and master and not os.path.exists("data/shakespeare/meta.json"):
    prepare_shakespeare.prepare()
if world > 1:
    dist.barrier()
meta = load_meta(cfg.dataset)
tokenizer = Tokenizer(meta)
V, B, T, A = tokenizer.V, cfg.batch_size, cfg.block_size, cfg.gradient_accumulation_steps
n_ids = meta["vocab_size"]                                                      # V, if not padded
splits = {split: load_bin(cfg.dataset, split, n_ids, T, look=master) for split in ("train", "val")}


def batch(split, *key):
    """Crops (B, T) on the device that depend on key alone; it seeds the noise and dropout to come, too."""
    rng = np.random.default_rng((0, *key))                                      # (1, *key) is for the times
    x0 = crops(splits[split], rng, B, T)
    torch.manual_seed(int(rng.integers(2 ** 63)))
    return to_device(x0)


def to_device(tensor):
    """Copies to the device; on CUDA through pinned memory, so that the host need not wait."""
    return tensor.pin_memory().to(cfg.device, non_blocking=True) if on_cuda else tensor.to(cfg.device)


# ------------------------------------------------------------------------------------------------------------
# model, averaged model, optimizers

torch.manual_seed(cfg.seed)
model = PROCESSES[cfg.process](cfg, V).to(cfg.device)
counts = np.bincount(splits["train"][:10_000_000], minlength=n_ids) + 1
model.bias.data.fill_(-1e30)                                                    # ids of padding: never
model.bias.data[:n_ids] = torch.from_numpy(np.log(counts / counts.sum()))       # frequencies need no learning
ema = copy.deepcopy(model).eval().requires_grad_(False)
optimizers = configure_optimizers(model, cfg)
step, best = 0, math.inf

ckpt_path, model_path = os.path.join(cfg.out_dir, "ckpt.pt"), os.path.join(cfg.out_dir, "model.pt")
log_path = os.path.join(cfg.out_dir, "log.csv")
if cfg.init_from != "scratch":
    path = ckpt_path if cfg.init_from == "resume" else cfg.init_from
    ckpt = load_checkpoint(path)
    for name in "process", "n_layer", "n_head", "n_embd", "embed_dim":
        there = ckpt["config"].get(name)
        if there != getattr(cfg, name):
            fail(f"{path} has {name} {there}, not {getattr(cfg, name)}: pass --{name}={there}")
    if any(ckpt["meta"].get(name) != meta.get(name) for name in ("tokenizer", "chars", "vocab_size")):
        fail(f"{path} was trained with another vocabulary than that of data/{cfg.dataset}")
    if not cfg.eval_only and os.path.abspath(path) == os.path.abspath(model_path):
        fail(f"init_from is {path}, which this run would overwrite: pass another --out_dir")
    load_weights(model, ckpt["model"], path)
    load_weights(ema, ckpt.get("ema", ckpt["model"]), path)
    if cfg.init_from == "resume":
        if "optimizers" not in ckpt:
            fail(f"{path} has no optimizer state to resume from: pass --init_from={path}")
        for optimizer, state in zip(optimizers, ckpt["optimizers"]):            # the settings are this run's
            optimizer.load_state_dict(state | {"param_groups": optimizer.state_dict()["param_groups"]})
        step, best = ckpt["step"], ckpt["best"]
    elif cfg.eval_only:
        step = ckpt["step"]
    del ckpt

if cfg.compile:
    model.compile()
net = DistributedDataParallel(model) if world > 1 else model
n_params = sum(p.numel() for p in model.parameters())
name = torch.cuda.get_device_name(cfg.device) if on_cuda else f"{torch.get_num_threads()} threads"
if master:
    print(f"{cfg.process} diffusion on {cfg.device} ({name}) x {world}, {cfg.dtype}"
          f"{', compiled' if cfg.compile else ''}: {n_params / 1e6:.2f} M parameters, of these "
          f"{sum(p.numel() for p in model.net.blocks.parameters()) / 1e6:.2f} M in the blocks")
    n_train, n_step = len(splits["train"]), A * B * T
    print(f"data/{cfg.dataset}: {n_train:,} tokens to train on, {len(splits['val']):,} to validate, "
          f"vocabulary {V:,}; source: {meta['source']}")
    print(f"{cfg.max_iters:,} steps of {n_step:,} tokens = {cfg.max_iters * n_step / n_train:.1f} epochs; "
          f"logs and checkpoints in {cfg.out_dir}")


# ------------------------------------------------------------------------------------------------------------
# evaluation: the averaged weights, the same crops and noise each time, dealt to all processes

@torch.no_grad()
def evaluate():
    """The bound on the validation split and its standard error, from eval_iters batches (nats per token)."""
    means = torch.zeros(cfg.eval_iters, dtype=torch.float64)
    for i in range(rank, cfg.eval_iters, world):
        x0 = batch("val", i)
        means[i] = ema.nelbo(x0, to_device(times(np.random.default_rng((1, i)), 1, B)[0])).mean().item()
    means = total(means)
    return means.mean().item(), means.std().item() / cfg.eval_iters ** 0.5


@torch.no_grad()
def table():
    """What the model knows at each noise level, as text: one row for each t."""
    lines, n_batches = [], max(1, cfg.eval_iters // 8)
    for t in (0.05, *(i / 10 for i in range(1, 10)), 0.95):
        sums = torch.zeros(len(ema.MEASURES))
        for i in range(rank, n_batches, world):
            measures = ema.measures(batch("val", i), torch.full((B,), t, device=cfg.device))
            sums += torch.tensor([float(measures[name]) for name in ema.MEASURES])
        lines += [f"{t:6.2f}" + "".join(f"{value:15.4f}" for value in total(sums) / n_batches)]
    return "\n".join(["     t" + "".join(f"{name:>15}" for name in ema.MEASURES), *lines])


def report():
    """Evaluates, prints and logs; writes both checkpoints; prints a sample. Stops if a loss is not finite."""
    global best
    mean_loss = check_losses()
    nelbo, se = evaluate()
    if not math.isfinite(nelbo):
        fail(f"the bound is {nelbo} at step {step}: lower the learning rate ({cfg.out_dir} keeps the last)")
    bits = nelbo / math.log(2)
    unit = f"{bits:.3f} bits/char" if tokenizer.chars else f"perplexity <= {math.exp(nelbo):.2f}"
    rows = table()
    if not master:
        return
    seconds = f"{time.time() - started:.0f}"
    tqdm.write(f"step {step}: val nelbo {nelbo:.4f} ± {se:.4f} nats/token, {unit}"
               + ("" if cfg.eval_only else f", train loss {mean_loss:.4f}, {seconds} s") + f"\n{rows}")
    if cfg.eval_only:
        return
    common = {"config": asdict(cfg), "meta": meta, "step": step, "nelbo": nelbo, "se": se}
    if nelbo < best:
        best = nelbo
        save_checkpoint(model_path, common | {"model": ema.state_dict()})
    save(common)
    with open(log_path, "a", newline="") as f:
        csv.writer(f).writerow([step, f"{mean_loss:.4f}", f"{nelbo:.4f}", f"{se:.4f}", seconds])
    torch.manual_seed(-1)                # not cfg.seed: the noise would be the embeddings that it drew
    known = torch.zeros(4 if step == cfg.max_iters else 1, T, dtype=torch.bool, device=cfg.device)
    *_, (tokens, _) = ema.sample(known.long(), known, min(T, 128))
    tqdm.write("\n".join(["-" * 80] + [tokenizer.decode(row) + "\n" + "-" * 80 for row in tokens.tolist()]))


def save(common):
    save_checkpoint(ckpt_path, common | {
        "model": model.state_dict(), "ema": ema.state_dict(), "best": best,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers]})


# ------------------------------------------------------------------------------------------------------------
# training

losses = []                              # of the steps since the last look, on the device


def check_losses():
    """Mean loss of the steps since the last look; waits for the device, so not done every step."""
    global losses
    if not losses:
        return math.nan
    values = total(torch.stack(losses).cpu() / world)
    for i, value in enumerate(values.tolist()):
        if not math.isfinite(value):
            fail(f"the loss is {value} at step {step - len(losses) + i}: lower the learning rate, or look at "
                 f"the data; {cfg.out_dir} keeps the last good checkpoint")
    losses = []
    return values.mean().item()


stopping = torch.zeros(1)
started = time.time()
if cfg.eval_only:
    report()
    cfg.max_iters = step                 # and no step more
else:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.fill_(1))
if master and not cfg.eval_only:         # a resumed run keeps what was logged up to its step
    rows = []
    try:
        os.makedirs(cfg.out_dir, exist_ok=True)
        if step and os.path.exists(log_path):
            with open(log_path, newline="") as f:
                rows = [row for row in csv.reader(f) if row and row[0].isdigit() and int(row[0]) <= step]
        with open(log_path, "w", newline="") as f:
            csv.writer(f).writerows([["step", "train_loss", "val_nelbo", "se", "seconds"], *rows])
    except OSError as e:
        fail(f"{cfg.out_dir} can't be written to: {e.strerror}")
    if rows:
        started -= float(rows[-1][4])
    if step >= cfg.max_iters:
        print(f"step {step} of {cfg.max_iters} is done: pass a larger --max_iters to go on")

peak = peak_flops(name) if on_cuda else None
looked, looked_step = time.time(), step
bar = tqdm(initial=step, total=cfg.max_iters, unit="step", disable=not master or cfg.eval_only)
while step < cfg.max_iters:
    decay = (cfg.max_iters - step) / (0.6 * cfg.max_iters)
    for optimizer, peak_lr in zip(optimizers, (cfg.learning_rate, cfg.adam_lr)):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(1, (step + 1) / max(1, cfg.warmup_iters), decay)

    t = times(np.random.default_rng((1, cfg.seed, step)), A, B)
    model.train()
    loss = 0
    for m in range(rank, A, world):
        x0 = batch("train", cfg.seed, step, m)
        if world > 1:
            net.require_backward_grad_sync = m + world >= A
        micro_loss = net(x0, to_device(t[m])) * (world / A)
        micro_loss.backward()
        loss += micro_loss.detach()
    losses.append(loss)
    step += 1
    update(model, ema, optimizers, cfg.grad_clip, min(cfg.ema_decay, (1 + step) / (10 + step)), total)

    bar.update()
    if step % cfg.eval_interval == 0 or step == cfg.max_iters:
        report()
        looked, looked_step = time.time(), step
    elif step % cfg.log_interval == 0:
        loss = check_losses()
        rate = (step - looked_step) * A * B * T / (time.time() - looked)
        mfu = f", MFU {rate * model.flops(T) / (peak * world):.1%}" if peak else ""
        bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s{mfu}")
        looked, looked_step = time.time(), step
    stop = total(stopping.clone())
    if stop.item():
        check_losses()
        if master:
            common = {"config": asdict(cfg), "meta": meta, "step": step}
            if best == math.inf:         # so that there is something to sample from
                save_checkpoint(model_path, common | {"model": ema.state_dict()})
            save(common)
            tqdm.write(f"stopped at step {step} and saved {ckpt_path}: go on with --init_from=resume")
        break
bar.close()
if world > 1:
    del net                              # it holds the process group, whose threads must end before Python
    gc.collect()
    dist.destroy_process_group()
