"""Training steps beside those of nanoGPT, at equal size: CPU time in turns, or what nanoGPT's model learns.

    git clone https://github.com/karpathy/nanoGPT
    OMP_NUM_THREADS=1 python results/race.py nanoGPT --dataset=characters             # a step of each, in turns
    OMP_NUM_THREADS=1 python results/race.py nanoGPT --dataset=characters --max_iters=800 --seed=1    # trains it

Flags are train.py's. Without --max_iters, steps are timed: of masked, embed, and nanoGPT's model with its own
optimizer, in one process each, so that they share nothing. With it, nanoGPT's model takes so many steps with the
rates of its config/train_shakespeare_char.py and is measured on crops of the validation split.
"""
import copy
import importlib.util
import math
import multiprocessing
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from config import Config, hardware, load
from data import Tokenizer, crops, load_data
from diffusion import PROCESSES, times
from optim import configure_optimizers, update

ROUNDS = 25


def nanogpt(folder, cfg, V):
    """nanoGPT's model of this size, and its optimizer."""
    spec = importlib.util.spec_from_file_location("nanogpt", f"{folder}/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(
        block_size=cfg.block_size, vocab_size=V, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd,
        dropout=cfg.dropout, bias=False))
    return model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")


def data(cfg):
    """The splits, and the size of the vocabulary; nanoGPT's crops are longer by one token."""
    meta, splits = load_data(cfg.dataset, cfg.block_size + 1)
    return splits, Tokenizer(meta).V


def its_loss(model, tokens, rng, cfg):
    """The loss of nanoGPT's model on a batch of crops: it predicts each token but the first."""
    x = crops(tokens, rng, cfg.batch_size, cfg.block_size + 1)
    return model(x[:, :-1].contiguous(), x[:, 1:].contiguous())[1]


def its_step(model, optimizer, tokens, rng, cfg):
    """One training step of nanoGPT's model."""
    its_loss(model, tokens, rng, cfg).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def our_step(model, ema, optimizers, tokens, rng, cfg):
    """One training step of masked or embed."""
    B = cfg.batch_size
    model(crops(tokens, rng, B, cfg.block_size), times(rng, 1, B, bell=True)[0]).backward()
    update(model, ema, optimizers, cfg.grad_clip, cfg.ema_decay)


def runner(pipe, name, folder, cfg):
    """Answers each message by the CPU seconds of a step; one process for each model."""
    splits, V = data(cfg)
    torch.manual_seed(cfg.seed)
    if name == "nanoGPT":
        model, optimizer = nanogpt(folder, cfg, V)
        step = partial(its_step, model, optimizer)
    else:
        model = PROCESSES[name](cfg, V)
        step = partial(our_step, model, copy.deepcopy(model), configure_optimizers(model, cfg))
    step = partial(step, splits["train"], np.random.default_rng(cfg.seed), cfg)
    if cfg.compile:
        torch._dynamo.config.capture_dynamic_output_shape_ops = True            # as train.py does
        model.compile()
    for _ in range(3):                                                          # the first steps are slow
        step()
    pipe.send("ready")
    while True:
        pipe.recv()
        start = time.process_time()
        step()
        pipe.send(time.process_time() - start)


def race(folder, cfg):
    """Prints the median CPU time of a step of each, and its ratio to nanoGPT's."""
    names = "nanoGPT", *PROCESSES
    pipes, seconds, processes = {}, {name: [] for name in names}, []
    for name in names:
        pipes[name], theirs = multiprocessing.Pipe()
        processes.append(multiprocessing.Process(target=runner, args=(theirs, name, folder, cfg)))
        processes[-1].start()
    for pipe in pipes.values():
        pipe.recv()                                                             # it is ready
    for _ in range(ROUNDS):
        for name, pipe in pipes.items():
            pipe.send("go")
            seconds[name].append(pipe.recv())
    for process in processes:
        process.terminate()
    for name in names:
        ratios = [a / b for a, b in zip(seconds[name], seconds["nanoGPT"])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:10} {1e3 * statistics.median(seconds[name]):7.0f} ms of CPU time, median of the ratios to "
              f"nanoGPT's {middle:.3f}, quartiles {low:.3f} and {high:.3f}")


def learn(folder, cfg):
    """Trains nanoGPT's model with its own schedule; prints its loss on validation crops."""
    splits, V = data(cfg)
    torch.manual_seed(cfg.seed)
    rng = np.random.default_rng(cfg.seed)
    model, optimizer = nanogpt(folder, cfg, V)
    for i in range(cfg.max_iters):
        share = (i - 100) / (cfg.max_iters - 100)
        rate = 1e-3 * (i + 1) / 101 if i < 100 else 1e-4 + 9e-4 * (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        its_step(model, optimizer, splits["train"], rng, cfg)
    model.eval()
    losses = torch.zeros(cfg.eval_iters)
    with torch.no_grad():
        for i in range(cfg.eval_iters):
            losses[i] = its_loss(model, splits["val"], np.random.default_rng((0, i)), cfg)
    se = losses.std() / cfg.eval_iters ** 0.5
    print(f"nanoGPT, {cfg.max_iters} steps, seed {cfg.seed}: {losses.mean():.4f} ± {se:.4f} nats/token")


if __name__ == "__main__":
    folder, *flags = sys.argv[1:]
    cfg = hardware(load(Config, [*flags, "--device=cpu"]))
    if any(flag.startswith("--max_iters") for flag in flags):
        learn(folder, cfg)
    else:
        multiprocessing.set_start_method("spawn")
        race(folder, cfg)
