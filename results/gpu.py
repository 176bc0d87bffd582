"""What a first GPU shows, in parts of a few minutes, so that a quarter of an hour of a borrowed one serves.

    python results/gpu.py out-gpu losses
    python results/gpu.py out-gpu all --device=cpu --dtype=float32 --compile=False --max_iters=10 --eval_iters=2 \
        --n_layer=1 --n_head=1 --n_embd=32 --block_size=32 --batch_size=2       # tests all parts on a CPU

The parts, in order of value:

    losses          do losses and gradients agree, CPU and device, eager and compiled, float32 and bfloat16,
                    at the same noise? Meanwhile train.py takes 50 steps in each of these ways
    graph           GPT-2's size: is a compiled step one graph, is it compiled again when the number of masks
                    changes, how often does the host wait, which kernels take the time?
    speed           bench.py at GPT-2's size, compiled: ms, MFU, memory, tokens/s of sampling
    train-masked    Tiny Shakespeare, as many steps as the minutes allow, with samples; then how good and how
    train-embed     fast 64 samples are in 16, 64 and 256 steps
    speed-eager     bench.py at GPT-2's size, not compiled

What is printed is appended to gpu.md in the folder at once. After its minutes (4, or --minutes) a part ends
all that it has started; what it found by then is kept. torch keeps compiled code for the next run on the same
machine, so a part that was cut while it compiled gets further then. Other flags go to train.py and bench.py,
and have the last word: --compile=False compiles nothing.
"""
import argparse
import copy
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import numpy as np
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import DeviceType
from torch.profiler import profile

HERE, ROOT = Path(__file__).resolve().parents[:2]
sys.path[:0] = str(HERE), str(ROOT)
from judge import Judge
from samplers import HEAD, ROW, measure

from config import Config, hardware, load
from diffusion import PROCESSES, load_model, times
from optim import configure_optimizers, update

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("part")
parser.add_argument("--minutes", type=float, default=4)
args, flags = parser.parse_known_args()
args.folder = args.folder.resolve()
args.folder.mkdir(parents=True, exist_ok=True)
os.chdir(ROOT)
began = time.time()
limit = 60 * args.minutes


def seconds_left():
    return began + limit - time.time()


def say(text):
    with open(args.folder / "gpu.md", "a", encoding="utf-8") as f:
        f.write(text + "\n")
    print(text, flush=True)


# ---- scripts as child processes


def start(script, *settings, reserve=0):
    """A child process that runs a script; it is ended so many seconds before the part's time is over."""
    command = [sys.executable, "-u", script, *settings]
    child = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seconds = max(0, seconds_left() - reserve)
    child.timers = [Timer(seconds, child.terminate), Timer(seconds + 15, child.kill)]   # train.py saves first
    for timer in child.timers:
        timer.start()
    return child


def output(child):
    """Yields a child's lines as they come, and one more if it fails."""
    for line in child.stdout:
        yield line.rstrip()
    code = child.wait()
    for timer in child.timers:
        timer.cancel()
    if code:
        yield f"ended with exit code {code} after {time.time() - began:.0f} s of this part"


def run(script, *settings, reserve=0):
    """Runs a script and says what it prints."""
    say(f"\n    $ python {script} {' '.join(settings)}")
    for line in output(start(script, *settings, reserve=reserve)):
        say("    " + line)


# ---- losses


@contextmanager
def cpu_noise():
    """In here all random numbers are drawn on the CPU, so that other devices see the same ones."""
    rand, rand_like, randn_like = torch.rand, torch.rand_like, torch.randn_like
    torch.rand = lambda *size, device=None: rand(*size).to(device)
    torch.rand_like = lambda x: rand_like(x, device="cpu").to(x.device)
    torch.randn_like = lambda x: randn_like(x, device="cpu").to(x.device)
    yield
    torch.rand, torch.rand_like, torch.randn_like = rand, rand_like, randn_like


def setting(process, V, *settings):
    """(cfg, model, tokens (B, T), times (B,)), the same weights and numbers each time."""
    cfg = hardware(load(Config, [f"--process={process}", *settings]))
    torch.manual_seed(0)
    model = PROCESSES[process](cfg, V)
    for p in model.parameters():                        # what starts at zero would hide the rest
        torch.nn.init.normal_(p, std=0.05)
    x0 = torch.randint(V, (cfg.batch_size, cfg.block_size))
    t = times(np.random.default_rng(0), 1, cfg.batch_size)[0]
    return cfg, model.to(cfg.device), x0.to(cfg.device), t.to(cfg.device)


def gradients(process, *settings):
    """The loss of one micro-batch and its gradient, a long vector on the CPU."""
    cfg, model, x0, t = setting(process, 65, "--dtype=float32", "--compile=False", *settings)
    if cfg.compile:
        torch._dynamo.reset()
        model.compile()
    torch.manual_seed(1)
    loss = model(x0, t)
    loss.backward()
    gradient = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
    return loss.item(), gradient


def compare(name, this, other):
    """Says how far a (loss, gradient) is from another."""
    error = (this[1] - other[1]).norm() / other[1].norm()
    say(f"- {name}: loss {this[0]:.6f} and {other[0]:.6f}, gradients differ by {error:.1e} of their length")


def losses():
    for process in PROCESSES:
        for T in 64, 65:                                # other kernels where it is no multiple of 8
            settings = *flags, f"--block_size={T}"
            with cpu_noise():
                compare(f"{process}, {T} tokens, eager float32 on the device and on the CPU",
                        gradients(process, *settings), gradients(process, *settings, "--device=cpu"))

    if not os.path.exists("data/shakespeare"):          # once, before many look for it
        run("prepare_shakespeare.py")
    children = {}
    with tempfile.TemporaryDirectory() as folder:
        for process in PROCESSES:
            for way in "--device=cpu", "--compile=False", "--compile=True", "--dtype=float32":
                children[f"{process} {way}"] = start(
                    "train.py", f"--process={process}", "--max_iters=50", "--eval_iters=16",
                    f"--out_dir={folder}/{len(children)}", way, *flags)

        # compiled code draws the same numbers as eager code if it may not use a generator of its own
        torch._inductor.config.fallback_random = True
        for process in PROCESSES:
            precise = gradients(process, *flags)
            for ways in ["--compile=True"], ["--dtype=bfloat16"], ["--dtype=bfloat16", "--compile=True"]:
                this = gradients(process, *ways, *flags)
                compare(f"{process} {' '.join(ways)} and eager float32", this, precise)

        say("\nnats/token of train.py after 0 and 50 steps, with noise of the device's own:\n")
        for name, child in children.items():
            found = list(output(child))
            bounds = [line.split("nelbo ")[1].split(" nats")[0] for line in found if "nelbo " in line]
            say(f"- {name}: {', '.join(bounds)}")
            if len(bounds) < 2:
                say(f"  {found[-2:]}")


# ---- one graph, and how fast it is


def stepper(process, V, *settings, backend="inductor"):
    """(cfg, step): step() is one of train.py's with random times and one micro-batch; it returns the loss."""
    cfg, model, x0, t = setting(process, V, *settings)
    ema = copy.deepcopy(model)
    optimizers = configure_optimizers(model, cfg)
    if cfg.compile:
        model.compile(backend=backend)

    def step():
        loss = model(x0, torch.rand_like(t))
        loss.backward()
        update(model, ema, optimizers, cfg.grad_clip, cfg.ema_decay)
        return loss

    return cfg, step


def graph():
    for process in PROCESSES:
        counter = CompileCounterWithBackend("inductor")
        path = f"config/owt_{process}.py"
        cfg, step = stepper(process, 50304, path, "--batch_size=4", *flags, backend=counter)
        on_cuda = "cuda" in cfg.device
        compiled, waits = [], []
        for _ in range(6):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if on_cuda:
                    torch.cuda.set_sync_debug_mode("warn")
                step()
                if on_cuda:
                    torch.cuda.set_sync_debug_mode("default")
            compiled.append(counter.frame_count)
            waits.append(sum("synchroniz" in str(w.message) for w in caught))
        say(f"\n{process}: graphs compiled after each step {compiled}; waits of the host in each "
            f"{waits if on_cuda else 'are not counted on a CPU'}; {time.time() - began:.0f} s")

        with profile() as trace:
            for _ in range(3):
                step()
            if on_cuda:
                torch.cuda.synchronize()
        kind = DeviceType.CUDA if on_cuda else DeviceType.CPU
        cost = {e.key: (e.self_device_time_total if on_cuda else e.self_cpu_time_total, e.count)
                for e in trace.key_averages() if e.device_type == kind}
        total = sum(us for us, _ in cost.values())
        say(f"\n{total / 3000:.1f} ms of kernels a step; the longest, with calls in three steps:\n")
        for name, (us, count) in sorted(cost.items(), key=lambda item: -item[1][0])[:16]:
            say(f"    {us / total:6.1%} {us / 3000:9.3f} ms {count:5}  {name[:90]}")


def speed(compiled):
    run("bench.py", "config/owt_embed.py", "--gradient_accumulation_steps=1", "--dataset=synthetic",
        f"--compile={compiled}", *flags)


# ---- Tiny Shakespeare


def train(process):
    path = f"config/shakespeare_{process}.py"
    cfg, step = stepper(process, 65, path, *flags)
    for _ in range(5):                                  # the first ones are slow
        step().item()
    start = time.time()
    for _ in range(20):
        loss = step()
    loss.item()                                         # waits for the device
    seconds = (time.time() - start) / 20
    # a good half of the time that is left is for the steps, the rest for starting, evaluating and sampling
    steps = max(1, min(20_000, int(0.55 * seconds_left() / seconds)))
    say(f"\n{process}, {1e3 * seconds:.1f} ms a step: {steps} steps")
    with tempfile.TemporaryDirectory() as folder:
        run("train.py", path, f"--out_dir={folder}", f"--max_iters={steps}", "--eval_iters=16",
            f"--eval_interval={math.ceil(steps / 3)}", *flags, reserve=0.15 * limit)
        if not os.path.exists(f"{folder}/model.pt"):
            sys.exit(f"error: {process} was not evaluated once within {args.minutes} minutes")
        model, tokenizer, trained, ckpt = load_model(f"{folder}/model.pt", device=cfg.device, dtype=cfg.dtype)
    judge = Judge(f"data/{trained.dataset}")
    say(f"\n{process}, bound {ckpt['nelbo']:.4f} at step {ckpt['step']}; 64 samples of "
        f"{trained.block_size} tokens:\n")
    say(HEAD)
    for steps in 16, 64, 256:
        calls, *row = measure(model, judge, tokenizer, trained.block_size, steps, {})
        say(ROW.format(process, steps, calls, *row))


# ---- which part


PARTS = {
    "losses": losses,
    "graph": graph,
    "speed": lambda: speed(True),
    "train-masked": lambda: train("masked"),
    "train-embed": lambda: train("embed"),
    "speed-eager": lambda: speed(False),
}


def cut():
    """What compiles or computes in this very process is ended, too, a little later than the others."""
    say(f"\n{args.part} is cut after {time.time() - began:.0f} s")
    os._exit(1)


if args.part == "all":
    for part in PARTS:
        command = [sys.executable, __file__, str(args.folder), part, f"--minutes={args.minutes}", *flags]
        subprocess.run(command, check=False)
    sys.exit()
if args.part not in PARTS:
    sys.exit(f"error: {args.part!r} is none of the parts {', '.join(PARTS)}, all")
guard = Timer(limit + 20, cut)
guard.daemon = True
guard.start()
torch._dynamo.config.capture_dynamic_output_shape_ops = True                    # as train.py does
chip = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
say(f"\n## {args.part}, {time.ctime()}: {chip}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
    f"flags {' '.join(flags)}\n")
PARTS[args.part]()
guard.cancel()
