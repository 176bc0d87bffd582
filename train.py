"""Trains a diffusion language model.

    python train.py                                              # laptop size, for 2 CPU cores
    torchrun --nproc_per_node=3 train.py config/shakespeare_masked.py --gradient_accumulation_steps=3
    python train.py --init_from=resume                           # goes on from out/ckpt.pt, exactly
    python train.py --init_from=out/model.pt --eval_only=True    # the bound of a model

What a step computes doesn't depend on the number of processes, and no random state needs to be saved:
micro-batch m of step s draws its crops, noise and dropout from generators seeded with (seed, s, m).
"""
import copy
import gc
import math
import os
import signal
import sys

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import prepare_shakespeare
from config import Config, fail, hardware, load
from data import Tokenizer, crops, load_checkpoint, load_data, load_weights, replace_file, save_checkpoint
from diffusion import PROCESSES, times
from optim import configure_optimizers, update

sys.stdout.reconfigure(line_buffering=True, errors="replace")
rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
master = rank == 0
say = tqdm.write if master else lambda text: None       # above the progress bar

# ---- settings: the defaults are those of the checkpoint that this run starts from, if any
cfg = load(Config)
ckpt_path, model_path, log_path = (f"{cfg.out_dir}/{name}" for name in ("ckpt.pt", "model.pt", "log.csv"))
path = ckpt_path if cfg.init_from == "resume" else cfg.init_from
ckpt = load_checkpoint(path) if path != "scratch" else {}
own = "out_dir", "init_from", "eval_only"               # settings of each run, whatever it starts from
was = {name: value for name, value in ckpt.get("config", {}).items() if name not in own}
asked = vars(load(Config, defaults=was))                # what checkpoints keep, for other machines
changed = [f"{name} {asked[name]} (was {old})" for name, old in was.items() if asked[name] != old]
cfg, resume = hardware(Config(**asked)), cfg.init_from == "resume" and not cfg.eval_only
for old in filter(os.path.exists, () if resume or cfg.eval_only else (ckpt_path, model_path)):
    fail(f"{old} is of another run: go on with --init_from=resume, pass another --out_dir, or delete it")
A, B, T = cfg.gradient_accumulation_steps, cfg.batch_size, cfg.block_size
if A % world:
    fail(f"gradient_accumulation_steps is {A}: it must be a multiple of the {world} processes")

# ---- processes: alone, or one of many under torchrun
on_cuda, signals = "cuda" in cfg.device, []             # signals: Ctrl-C, a scheduler's, a closed terminal's
if world > 1:
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
for number in signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT):  # Windows lacks SIGHUP
    if signal.getsignal(number) != signal.SIG_IGN:      # nohup ignores it, and so do we
        signal.signal(number, lambda *_: signals.append(1))     # a plain list: safe at any moment

def total(tensor):
    """The sum of a tensor over all processes."""
    if world > 1:
        dist.all_reduce(tensor)
    return tensor

def share(n):
    """Yields this process's part of 0 ... n - 1, in turns; all stop before the next, once signalled."""
    for first in range(0, n, world):
        if total(torch.tensor(len(signals))) > 0:
            raise KeyboardInterrupt
        if first + rank < n:
            yield first + rank

# ---- data
if cfg.dataset == "shakespeare" and master and not os.path.exists("data/shakespeare"):
    prepare_shakespeare.prepare()
total(torch.zeros(1))                                   # the others wait for that
meta, splits = load_data(cfg.dataset, T)
tokenizer, n_ids = Tokenizer(meta), meta["vocab_size"]  # n_ids is V, if that isn't padded

def batch(split, t, *key):
    """x0 and t (B,) on the device. Crops x0 (B, T) depend on key alone; it seeds noise and dropout, too."""
    rng = np.random.default_rng((0, *key))              # (1, *key) is for the times
    x0 = crops(splits[split], rng, B, T)
    torch.manual_seed(int(rng.integers(2 ** 63)))
    return [(x.pin_memory() if on_cuda else x).to(cfg.device, non_blocking=on_cuda) for x in (x0, t)]

# ---- model, averaged model, optimizers
torch.manual_seed(cfg.seed)
model = PROCESSES[cfg.process](cfg, tokenizer.V).to(cfg.device)
counts = np.bincount(splits["train"][:10_000_000], minlength=n_ids) + 1
model.bias.data.fill_(-1e30)                                                    # ids of padding: never
model.bias.data[:n_ids] = torch.from_numpy(np.log(counts / counts.sum()))       # frequencies need no learning
ema = copy.deepcopy(model).eval().requires_grad_(False)
optimizers = configure_optimizers(model, cfg)
step, measured, best = 0, 0, math.inf                   # measured: the last step that was evaluated
log = ["step,train_loss,val_nelbo,se\n"]                # lines of log.csv, over all resumptions
if ckpt:
    say(f"settings are those of {path}, step {ckpt['step']}" + ", but " * bool(changed) + ", ".join(changed))
    if ckpt["meta"].get("chars") != meta.get("chars"):
        fail(f"{path} was trained with another vocabulary than that of data/{cfg.dataset}")
    load_weights(model, ckpt["model"], path)
    load_weights(ema, ckpt.get("ema", ckpt["model"]), path)
    step = ckpt["step"] if resume or cfg.eval_only else 0
if resume:
    states = ckpt.get("optimizers") or fail(f"{path} has no optimizer state: pass --init_from={path}")
    for optimizer, state in zip(optimizers, states):    # the settings are this run's
        optimizer.load_state_dict(state | {"param_groups": optimizer.state_dict()["param_groups"]})
    measured, best, log = step if "nelbo" in ckpt else 0, ckpt["best"], ckpt.get("log", log)
    if any(asked[name] != was[name] for name in ("dataset", "block_size", "batch_size", "eval_iters")):
        best = math.inf                                 # of other validation batches
del ckpt
if cfg.compile:
    torch._dynamo.config.optimize_ddp = False           # one graph, as on one device: or dropout differs
    model.compile()
net = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
chip = torch.cuda.get_device_name() if on_cuda else f"{torch.get_num_threads()} threads"
n_params, n_train = sum(p.numel() for p in model.parameters()), len(splits["train"])
say(f"{cfg.process} diffusion on {cfg.device} ({chip}) x {world}, {cfg.dtype}{', compiled' * cfg.compile}: "
    f"{n_params / 1e6:.2f} M parameters\ndata/{cfg.dataset}: {n_train:,} tokens to train on, "
    f"{len(splits['val']):,} to validate, vocabulary {tokenizer.V:,}; source: {meta['source']}")

# ---- evaluation: the averaged weights, the same crops and noise each time, dealt to all processes
def save(**measures):
    """Writes ckpt.pt, to go on from, and model.pt, if there is none or nelbo is the best bound."""
    global best
    common = {"config": asked, "meta": meta, "step": step} | measures
    if measures.get("nelbo", math.inf) < best or not os.path.exists(model_path):    # something to sample from
        best = measures.get("nelbo", best)
        save_checkpoint(model_path, common | {"model": ema.state_dict()})
    save_checkpoint(ckpt_path, common | {
        "model": model.state_dict(), "ema": ema.state_dict(), "best": best, "log": log,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers]})

@torch.no_grad()
def evaluate(train_loss):
    """Prints the bound on the validation split and a row of measures for each t; logs, saves and samples."""
    torch.set_float32_matmul_precision("highest")       # of the bound nothing moves
    bounds = torch.zeros(cfg.eval_iters, dtype=torch.float64)                   # nats per token
    for i in share(cfg.eval_iters):
        t = times(np.random.default_rng((1, i)), 1, B)[0]                       # (B,)
        bounds[i] = ema.nelbo(*batch("val", t, i)).mean().item()
    nelbo, se = total(bounds).mean().item(), bounds.std().item() / cfg.eval_iters ** 0.5
    math.isfinite(nelbo) or fail(f"bound {nelbo} at step {step}: lower learning_rate; that isn't saved")
    bits = nelbo / np.log(2) * meta["val_tokens"] / meta.get("val_chars", meta["val_tokens"])
    unit = f"{bits:.3f} bits/char" if tokenizer.chars else f"perplexity <= {np.exp(nelbo):.2f}"
    rows, n = [], max(world, cfg.eval_iters // 8)       # n: batches of a row
    for t in (0.05, *(i / 10 for i in range(1, 10)), 0.95):
        sums = 0
        for i in share(n):
            measures = ema.measures(*batch("val", torch.full((B,), t), i))
            sums += torch.stack(list(measures.values())).cpu()
        rows += [f"{t:6.2f}" + "".join(f"{value:15.4f}" for value in total(sums) / n)]
    names = "     t" + "".join(f"{name:>15}" for name in measures)
    say("\n".join([f"step {step}: val nelbo {nelbo:.4f} ± {se:.4f} nats/token, {unit}", names, *rows]))
    if not master or cfg.eval_only:
        return
    log.append(f"{step},{train_loss:.4f},{nelbo:.4f},{se:.4f}\n")
    save(nelbo=nelbo)
    replace_file(log_path, lambda file: file.write("".join(log).encode()))
    torch.manual_seed(-1)                # not cfg.seed: the noise would be the embeddings that it drew
    known = torch.zeros(4 if step == cfg.max_iters else 1, T, dtype=torch.bool, device=cfg.device)
    *_, (tokens, _) = ema.sample(known.long(), known, min(T, 128))
    say("\n".join(["-" * 80] + [tokenizer.decode(row) + "\n" + "-" * 80 for row in tokens.tolist()]))

# ---- training
if cfg.eval_only:
    cfg.max_iters, measured = step, None                # no step, but the evaluation
elif master:
    say(f"{cfg.max_iters:,} steps of {A * B * T:,} tokens = {cfg.max_iters * A * B * T / n_train:.1f} epochs")
    try:
        os.makedirs(cfg.out_dir, exist_ok=True)
        open(log_path, "a").close()
    except OSError as e:
        fail(f"{cfg.out_dir} can't be written to: {e.strerror}")
losses = []                              # of the micro-batches since the last look, on the device
bar = tqdm(initial=step, total=cfg.max_iters, unit="step", disable=not master or cfg.eval_only)
try:
    while True:
        evaluating = step != measured and (step % cfg.eval_interval == 0 or step == cfg.max_iters)
        if evaluating or losses and step % cfg.log_interval == 0:               # not each step: it waits
            loss = total(torch.stack(losses or [torch.zeros(())]).mean()).item() / world
            math.isfinite(loss) or fail(f"loss {loss} at step {step}: lower learning_rate; that isn't saved")
            losses.clear()
            bar.set_postfix_str(f"loss {loss:.3f}")
            if evaluating:                              # after a resumption maybe at once
                evaluate(loss)
                measured = step
        if step >= cfg.max_iters:
            break

        warm, decay = (step + 1) / max(1, cfg.warmup_iters), (cfg.max_iters - step) / (0.6 * cfg.max_iters)
        for optimizer, lr in zip(optimizers, (cfg.learning_rate, cfg.adam_lr)):
            optimizer.param_groups[0]["lr"] = lr * min(1, warm, decay)
        t = times(np.random.default_rng((1, cfg.seed, step)), A, B, bell=True)  # (A, B)
        torch.set_float32_matmul_precision("high")      # TF32 on CUDA: losses move by less than .001
        for m in share(A):
            net.require_backward_grad_sync = m + world >= A                     # DDP sums up in the last one
            loss = net(*batch("train", t[m], cfg.seed, step, m))
            (loss * (world / A)).backward()
            losses.append(loss.detach())
        step += 1
        update(model, ema, optimizers, cfg.grad_clip, min(cfg.ema_decay, (1 + step) / (10 + step)))
        bar.update()
except KeyboardInterrupt:                # from share(): all that the last step changed is whole
    if master and not cfg.eval_only:
        save()
        say(f"stopped at step {step} and saved {ckpt_path}: go on with --init_from=resume")
bar.close()
if world > 1:
    del net                              # it holds the process group, whose threads must end before Python
    gc.collect()
    dist.destroy_process_group()
