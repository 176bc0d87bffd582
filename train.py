"""Trains a diffusion language model.

    python train.py                                              # laptop size, for 2 CPU cores
    python train.py config/shakespeare_masked.py --max_iters=2000
    torchrun --nproc_per_node=3 train.py config/shakespeare_masked.py --gradient_accumulation_steps=3
    python train.py --init_from=resume                           # goes on from out/ckpt.pt, exactly
    python train.py --init_from=out/model.pt --eval_only=True    # the bound of a model

What a step computes doesn't depend on the number of processes, and no random state needs to be saved:
micro-batch m of step s draws its crops, noise and dropout from generators seeded with (seed, s, m).
"""
import contextlib
import copy
import gc
import math
import os
import re
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
from optim import configure_optimizers, update

sys.stdout.reconfigure(line_buffering=True, errors="replace")
rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
master = rank == 0

# ------------------------------------------------------------------------------------------------------------
# settings: the defaults are those of the checkpoint that this run starts from, if any

cfg, ckpt = load(Config), None
ckpt_path, model_path, log_path = (os.path.join(cfg.out_dir, name) for name in ("ckpt.pt", "model.pt", "log.csv"))
resume, path = cfg.init_from == "resume", cfg.init_from
if path != "scratch":
    path = ckpt_path if resume else path
    ckpt = load_checkpoint(path)
    was = {name: value for name, value in ckpt["config"].items() if name not in ("out_dir", "init_from", "eval_only")}
    cfg = load(Config, defaults=was)
    changes = ", ".join(f"{name} {getattr(cfg, name)} (was {was[name]})" for name in was
                        if getattr(cfg, name) != was[name])
    if master:
        print(f"settings are those of {path}, step {ckpt['step']}" + (changes and ", but " + changes))
for old in (ckpt_path, model_path) if not resume and not cfg.eval_only else ():     # a run owns its folder
    if os.path.exists(old):
        fail(f"{old} is from step {load_checkpoint(old)['step']} of another run: go on with that by "
             f"--init_from=resume, pass another --out_dir, or delete {cfg.out_dir}")
asked, cfg = asdict(cfg), hardware(cfg)                 # checkpoints keep what was asked, for other machines
on_cuda = "cuda" in cfg.device
if cfg.gradient_accumulation_steps % world:
    fail(f"gradient_accumulation_steps is {cfg.gradient_accumulation_steps}, the micro-batches of a step "
         f"over all devices: it must be a multiple of the {world} processes")

# ------------------------------------------------------------------------------------------------------------
# processes: alone, or one of many under torchrun

if world > 1:
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
signalled = False


def note(*_):
    """Only notes that a signal came: Ctrl-C, SIGTERM from a scheduler, SIGHUP from a terminal that closes."""
    global signalled
    with contextlib.suppress(OSError):                  # of a terminal that is gone
        if master and not signalled:
            os.write(2, b"\nstopping after this step; a long one is left, and done again when resuming\n")
    signalled = True


for name in "SIGINT", "SIGTERM", "SIGHUP":
    number = getattr(signal, name, None)                # Windows has no SIGHUP; nohup ignores it, and so do we
    if number and signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, note)


def total(tensor):
    """The sum of a tensor over all processes."""
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


def share(n):
    """Yields this process's part of 0 ... n - 1, in turns of which all processes take equally many; before each
    turn all of them stop with KeyboardInterrupt if one was signalled."""
    for first in range(0, n, world):
        if total(torch.tensor(float(signalled))) > 0:
            raise KeyboardInterrupt
        if first + rank < n:
            yield first + rank


# ------------------------------------------------------------------------------------------------------------
# data

if cfg.dataset == "shakespeare" and master and not os.path.exists("data/shakespeare"):
    prepare_shakespeare.prepare()
total(torch.zeros(1))                                   # the others wait for that
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
step, measured, best, seconds = 0, 0, math.inf, 0.0     # measured: the last step that was evaluated
if ckpt:
    if any(ckpt["meta"].get(name) != meta.get(name) for name in ("tokenizer", "chars", "vocab_size")):
        fail(f"{path} was trained with another vocabulary than that of data/{cfg.dataset}")
    load_weights(model, ckpt["model"], path)
    load_weights(ema, ckpt.get("ema", ckpt["model"]), path)
    step = ckpt["step"] if resume or cfg.eval_only else 0
if resume and not cfg.eval_only:
    if "optimizers" not in ckpt:
        fail(f"{path} has no optimizer state to resume from: pass --init_from={path}")
    for optimizer, state in zip(optimizers, ckpt["optimizers"]):                # the settings are this run's
        optimizer.load_state_dict(state | {"param_groups": optimizer.state_dict()["param_groups"]})
    measured, best, seconds = step if "nelbo" in ckpt else 0, ckpt["best"], ckpt["seconds"]
    if any(was[name] != asked[name] for name in ("dataset", "block_size", "batch_size", "eval_iters")):
        best = math.inf
        tqdm.write("the validation batches are others than before: the best bound starts anew")
del ckpt
if cfg.compile:
    torch._dynamo.config.optimize_ddp = False           # one graph, as on one device: else other dropout is drawn
    model.compile()
net = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
chip = torch.cuda.get_device_name() if on_cuda else f"{torch.get_num_threads()} threads"
if master:
    n_train, n_step = len(splits["train"]), A * B * T
    print(f"{cfg.process} diffusion on {cfg.device} ({chip}) x {world}, {cfg.dtype}{', compiled' * cfg.compile}: "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters\ndata/{cfg.dataset}: {n_train:,} "
          f"tokens to train on, {len(splits['val']):,} to validate, vocabulary {V:,}; source: {meta['source']}")
    if not cfg.eval_only:
        print(f"{cfg.max_iters:,} steps of {n_step:,} tokens = {cfg.max_iters * n_step / n_train:.1f} epochs; "
              f"logs and checkpoints in {cfg.out_dir}")

# ------------------------------------------------------------------------------------------------------------
# evaluation: the averaged weights, the same crops and noise each time, dealt to all processes


@torch.no_grad()
def evaluate():
    """The bound on the validation split, its standard error (nats per token), and as text what the model knows
    at each noise level: a row for each t."""
    means = torch.zeros(cfg.eval_iters, dtype=torch.float64)
    for i in share(cfg.eval_iters):
        x0 = batch("val", i)
        means[i] = ema.nelbo(x0, to_device(times(np.random.default_rng((1, i)), 1, B)[0])).mean().item()
    means, rows, n = total(means), [], max(world, cfg.eval_iters // 8)
    for t in (0.05, *(i / 10 for i in range(1, 10)), 0.95):
        sums = 0
        for i in share(n):
            measures = ema.measures(batch("val", i), torch.full((B,), t, device=cfg.device))
            sums += torch.stack(list(measures.values())).cpu()
        rows += [f"{t:6.2f}" + "".join(f"{value:15.4f}" for value in total(sums) / n)]
    table = "\n".join(["     t" + "".join(f"{name:>15}" for name in measures), *rows])
    return means.mean().item(), means.std().item() / cfg.eval_iters ** 0.5, table


def save(path, **content):
    save_checkpoint(path, {"config": asked, "meta": meta, "step": step} | content)


def save_all(**measures):
    """Everything to go on from; measures are nelbo and se of this step, if it was evaluated."""
    save(ckpt_path, model=model.state_dict(), ema=ema.state_dict(), best=best, seconds=time.time() - started,
         optimizers=[optimizer.state_dict() for optimizer in optimizers], **measures)


def report(train_loss):
    """Evaluates, prints and logs; writes both checkpoints; prints a sample."""
    global best
    nelbo, se, table = evaluate()
    if not math.isfinite(nelbo):
        fail(f"the bound is {nelbo} at step {step}: lower the learning rate ({cfg.out_dir} keeps the last)")
    if not master:
        return
    bits, seconds = nelbo / math.log(2), f"{time.time() - started:.0f}"
    unit = f"{bits:.3f} bits/char" if tokenizer.chars else f"perplexity <= {math.exp(nelbo):.2f}"
    trained = "" if cfg.eval_only else f", train loss {train_loss:.4f}, {seconds} s"
    tqdm.write(f"step {step}: val nelbo {nelbo:.4f} ± {se:.4f} nats/token, {unit}{trained}\n{table}")
    if cfg.eval_only:
        return
    if nelbo < best:
        best = nelbo
        save(model_path, model=ema.state_dict(), nelbo=nelbo, se=se)
    save_all(nelbo=nelbo, se=se)
    with open(log_path, "a") as f:
        f.write(f"{step},{train_loss:.4f},{nelbo:.4f},{se:.4f},{seconds}\n")
    torch.manual_seed(-1)                # not cfg.seed: the noise would be the embeddings that it drew
    known = torch.zeros(4 if step == cfg.max_iters else 1, T, dtype=torch.bool, device=cfg.device)
    *_, (tokens, _) = ema.sample(known.long(), known, min(T, 128))
    tqdm.write("\n".join(["-" * 80] + [tokenizer.decode(row) + "\n" + "-" * 80 for row in tokens.tolist()]))


def mean_loss():
    """Of the steps since the last look; waits for the device, so not done every step."""
    loss = total(torch.stack(losses).mean()).item() / world if losses else 0.0
    if not math.isfinite(loss):
        fail(f"the loss is {loss} at step {step} or shortly before: lower the learning rate, or look at the "
             f"data; {cfg.out_dir} keeps the last good checkpoint")
    losses.clear()
    return loss


# ------------------------------------------------------------------------------------------------------------
# training

started = time.time() - seconds          # of the whole run, over all resumptions
if master and not cfg.eval_only:
    try:
        os.makedirs(cfg.out_dir, exist_ok=True)
        rows = []
        if resume and os.path.exists(log_path):         # keeps its whole lines up to this step
            with open(log_path, errors="replace") as f:
                rows = [row for row in f if re.fullmatch(r"\d+,.*\n", row) and int(row.split(",")[0]) <= step]
        with open(log_path, "w") as f:
            f.writelines(["step,train_loss,val_nelbo,se,seconds\n", *rows])
    except OSError as e:
        fail(f"{cfg.out_dir} can't be written to: {e.strerror}")
    if step == measured >= cfg.max_iters:
        print(f"step {step} of {cfg.max_iters} is done: pass a larger --max_iters to go on")
losses = []                              # of the steps since the last look, on the device
looked, looked_step = time.time(), step
bar = tqdm(initial=step, total=cfg.max_iters, unit="step", disable=not master or cfg.eval_only)
try:
    if cfg.eval_only:
        report(0.0)
    while not cfg.eval_only:
        evaluating = step != measured and (step % cfg.eval_interval == 0 or step == cfg.max_iters)
        if evaluating or losses and step % cfg.log_interval == 0:
            rate, loss = (step - looked_step) * A * B * T / (time.time() - looked), mean_loss()
            bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s")
            if evaluating:
                report(loss)
                measured = step
            looked, looked_step = time.time(), step
        if step >= cfg.max_iters:
            break

        decay = (cfg.max_iters - step) / (0.6 * cfg.max_iters)
        for optimizer, lr in zip(optimizers, (cfg.learning_rate, cfg.adam_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / max(1, cfg.warmup_iters), decay)
        t = times(np.random.default_rng((1, cfg.seed, step)), A, B)             # (A, B)
        model.train()
        loss = 0
        for m in share(A):
            x0 = batch("train", cfg.seed, step, m)
            net.require_backward_grad_sync = m + world >= A                     # DDP sums up in the last one
            micro_loss = net(x0, to_device(t[m])) * (world / A)
            micro_loss.backward()
            loss += micro_loss.detach()
        losses.append(loss)
        step += 1
        update(model, ema, optimizers, cfg.grad_clip, min(cfg.ema_decay, (1 + step) / (10 + step)))
        bar.update()
except KeyboardInterrupt:                # from share(): all that the last step changed is whole
    if master and not cfg.eval_only:
        if not os.path.exists(model_path):              # so that there is something to sample from
            save(model_path, model=ema.state_dict())
        save_all()
        print(f"\nstopped at step {step} and saved {ckpt_path}: go on with --init_from=resume")
bar.close()
if world > 1:
    del net                              # it holds the process group, whose threads must end before Python
    gc.collect()
    dist.destroy_process_group()
