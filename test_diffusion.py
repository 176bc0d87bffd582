"""Oracles first: the bound and the samplers against exact answers; then the tools, as a user runs them.

    python -m pytest
"""
import contextlib
import fcntl
import glob
import gzip
import hashlib
import http.server
import io
import itertools
import json
import lzma
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
import urllib.request
from collections import Counter
from pydoc_data.topics import topics
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import optim
from config import Config, SampleConfig, load
from data import Tokenizer, crops, load_checkpoint
from diffusion import ORDERS, PROCESSES, SCHEDULES, draw, load_model, probabilities, times
from pictures import animation
from prepare_shakespeare import joined

HERE = os.path.dirname(os.path.abspath(__file__))
aten = torch.ops.aten
TINY = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "batch_size": 8, "dtype": "float32",
        "device": "cpu"}
torch.set_num_threads(1)                    # models this small: more threads only wait for each other,
os.environ["OMP_NUM_THREADS"] = "1"         # for minutes if another program needs a core

def build(process, V, **settings):
    torch.manual_seed(0)
    return PROCESSES[process](Config(process=process, **TINY | settings), V).eval()

def stir(module, size=0.2):
    """Moves the weights from where they start, at which much is zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn_like(p))

def unknown(B, T):
    """x and known of B texts of T unknown tokens."""
    return torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.bool)

def data_and_times():
    """x0 (8, 32) of 11 tokens, and times in pairs for it."""
    return torch.randint(11, (8, 32)), times(np.random.default_rng(0), 1, 8)[0]

def is_distributed(tokens, weights):
    """Whether tokens (n,) are drawn in proportion to weights (V,), within five standard errors each."""
    truth = weights / weights.sum()
    share = torch.bincount(tokens, minlength=len(weights)) / len(tokens)
    return bool(((share - truth).abs() < 5 * (truth * (1 - truth) / len(tokens)).sqrt() + 1e-9).all())

# ---- exact posteriors of a first-order Markov chain: what each position may be, by forward-backward

V_CHAIN, T_CHAIN = 8, 12
CHAIN = torch.softmax(
    1.5 * torch.randn(V_CHAIN, V_CHAIN, generator=torch.Generator().manual_seed(1)), -1).double()
START = torch.linalg.matrix_power(CHAIN, 200)[0]                                # its stationary distribution
PAIRS = START[:, None] * CHAIN                                                  # of two tokens in a row
CHAIN_NATS = float(-(START * START.log()).sum() - (T_CHAIN - 1) * (PAIRS * CHAIN.log()).sum()) / T_CHAIN

def chain_draw(n):
    x = torch.zeros(n, T_CHAIN, dtype=torch.long)
    x[:, 0] = draw(START.expand(n, -1))
    for i in range(1, T_CHAIN):
        x[:, i] = draw(CHAIN[x[:, i - 1]])
    return x

def chain_posterior(evidence):
    """log p(token | all evidence) at each position; evidence (B, T, V) are likelihoods up to a factor."""
    forward, backward = torch.empty_like(evidence.double()), torch.ones_like(evidence.double())
    forward[:, 0] = START * evidence[:, 0]
    for i in range(1, evidence.size(1)):
        forward[:, i] = F.normalize(forward[:, i - 1] @ CHAIN * evidence[:, i], p=1, eps=0)
        backward[:, -1 - i] = F.normalize((backward[:, -i] * evidence[:, -i]) @ CHAIN.T, p=1, eps=0)
    return F.normalize(forward * backward, p=1, dim=-1, eps=0).log().clamp(min=-60)

def exact_chain(process, **constants):
    """The process with its network replaced by the chain's posterior, and constants of its class changed."""
    model = build(process, V_CHAIN, block_size=T_CHAIN)
    vars(model).update(constants)
    certain = torch.cat((torch.eye(V_CHAIN), torch.ones(1, V_CHAIN)))           # of a token, and of [MASK]

    def masked(xt, t, **_):
        return chain_posterior(certain[xt])

    def embed(xt, t, sc=None, known=None):
        logsnr, alike = model.logsnr(t), xt @ model.table().T
        evidence = ((logsnr.sigmoid().sqrt() / (-logsnr).sigmoid())[:, None, None] * alike).softmax(-1)
        if known is not None:
            evidence = certain[alike.argmax(-1)].where(known[..., None], evidence)
        return chain_posterior(evidence)

    model.denoise = locals()[process]
    return model

@pytest.mark.parametrize("process, constants, above", [
    ("masked", {}, 0), ("embed", {}, 0), ("embed", {"CURVE": (30, 9)}, 0), ("embed", {"CURVE": (2, 2)}, 0),
    # a short range of noise: the terms at its ends are worth .07 and .18; z1's marginal is .02 from N(0, I)
    ("embed", {"ENDS": (2, -2)}, 0.02)])
def test_bound_of_the_exact_posterior_is_the_entropy_that_of_another_is_above(process, constants, above):
    def mean_bound(batches):
        torch.manual_seed(0)
        with torch.no_grad():
            means = torch.stack([model.nelbo(chain_draw(64), times(np.random.default_rng(i), 1, 64)[0]).mean()
                                 for i in range(batches)])
        return float(means.mean()) - CHAIN_NATS, float(means.std() / batches ** 0.5)

    model = exact_chain(process, **constants)
    excess, se = mean_bound(300)
    assert se < 0.02 and -4 * se < excess < 4 * se + above
    exact = model.denoise
    model.denoise = lambda xt, t, **more: 0.4 * exact(xt, t, **more)
    excess, se = mean_bound(50)
    assert excess > 4 * se

@pytest.mark.parametrize("process, steps, settings", [
    ("masked", 12, {}), ("masked", 150, {"remask": 0.1}), ("masked", 150, {"noise": 0.6}),
    ("masked", 12, {"order": "confidence"}), ("masked", 12, {"order": "entropy", "threshold": 0.999}),
    ("embed", 100, {}), ("embed", 100, {"eta": 0.0}), ("embed", 150, {"noise": 0.4})])
def test_samples_of_the_exact_posterior_have_the_chains_transitions(process, steps, settings):
    torch.manual_seed(0)
    x, known = chain_draw(3000), unknown(3000, T_CHAIN)[1]
    *_, (y, _) = exact_chain(process).sample(x, known, steps, **settings)
    kept, chance = float((y == x).float().mean()), float((START ** 2).sum())
    # tokens stay, or are like what they were, where the noise leaves something of them
    assert chance + 0.1 < kept < 0.95 if "noise" in settings else abs(kept - chance) < 0.02
    assert is_distributed((y[:, :-1] * V_CHAIN + y[:, 1:]).flatten(), PAIRS.flatten())

@pytest.mark.parametrize("process, w", [("masked", 0.0), ("masked", 0.5), ("masked", 2.0), ("embed", 0.0)])
def test_infill_follows_the_true_conditional_over_the_marginal_to_the_power_of_guidance(process, w):
    torch.manual_seed(0)
    x, known = torch.tensor([2, 0, 5]).expand(4000, -1), torch.tensor([True, False, True]).expand(4000, -1)
    *_, (y, _) = exact_chain(process).sample(x, known, {"masked": 3, "embed": 100}[process], guidance=w)
    assert (y[:, ::2] == x[:, ::2]).all()
    assert is_distributed(y[:, 1], (CHAIN[2] * CHAIN[:, 5]) ** (1 + w) / START ** w)

def test_guidance_of_embed_makes_what_fits_the_known_tokens_likelier():
    torch.manual_seed(0)
    x, known = torch.full((2000, 3), 2), torch.tensor([True, False, True]).expand(2000, -1)
    truth, means = CHAIN[2] * CHAIN[:, 2] / START, []                           # what the neighbours tell
    for w in 0.0, 1.0, 3.0:
        *_, (y, _) = exact_chain("embed").sample(x, known, 50, guidance=w)
        means.append(float(truth.log()[y[:, 1]].mean()))
    assert means[0] + 0.1 < means[1] < means[2] - 0.02, means

# ---- exact counts and identities

def test_uniform_logits_cost_exactly_log_V():
    model = build("masked", 65)
    model.denoise = lambda xt, t, **_: torch.zeros(*xt.shape, 65)
    bound = model.nelbo(torch.randint(65, (8, 32)), torch.rand(8))
    assert torch.allclose(bound, torch.full((8,), math.log(65)), atol=1e-5)

def test_mean_over_all_masks_is_mean_chain_rule_over_all_orders():
    V, T = 3, 4
    model = build("masked", V, block_size=T)
    stir(model, 0.3)
    x0 = torch.tensor([[2, 0, 1, 1]])

    def only(places):
        return torch.tensor([[i in places for i in range(T)]])                  # (1, T)

    def nats(i, masked):
        logits = model.denoise(x0.masked_fill(masked, V), masked.sum(1) / T)
        return F.cross_entropy(logits[0, i], x0[0, i])

    chain = [nats(i, only(order[n:]))
             for order in itertools.permutations(range(T)) for n, i in enumerate(order)]
    per_k = []
    for k in range(1, T + 1):
        bounds = []
        for places in itertools.combinations(range(T), k):
            masked = only(places)
            model.corrupt = lambda x0, t, masked=masked: x0.masked_fill(masked, V)
            bounds.append(model.nelbo(x0, torch.tensor([(k - 0.5) / T])))
        per_k.append(torch.stack(bounds).mean())
    assert abs(torch.stack(per_k).mean() - torch.stack(chain).mean()) < 1e-5

@pytest.mark.parametrize("T", [1, 7, 32, 100, 1000])
def test_masks_are_exact_and_mirrored(T):
    model, x0 = build("masked", 5), torch.zeros(16, T, dtype=torch.long)
    for t in [t for seed in range(20) for t in times(np.random.default_rng(seed), 3, 16)]:
        xt = model.corrupt(x0, t)
        k = (xt == 5).sum(1)
        assert torch.equal(k, (t.double() * T).floor().long() + 1) and ((xt == 5) | (xt == 0)).all()
        assert (k[:8] + k[8:] == T + 1).all()
    assert (model.corrupt(x0[:2], torch.tensor([0.0, 1.0])) == 5).sum(1).tolist() == [1, T]

def test_times_are_stratified_over_the_whole_step_and_crops_cover_the_split():
    t = times(np.random.default_rng(0), 4, 8)
    assert torch.equal(t[:, :4] + t[:, 4:], torch.ones(4, 4))
    # 16 pairs: no gap beyond two strata, and each micro-batch by itself
    assert (t.flatten().sort().values.diff() < 2 / 16).all()
    assert all((row.sort().values.diff() < 2 / 4 + 1e-3).all() for row in t)
    mean = torch.stack([times(np.random.default_rng(i), 2, 4) for i in range(4000)])
    assert abs(mean.mean() - 0.5) < 1e-3 and abs(mean.var() - 1 / 12) < 2e-3    # each time is uniform
    bell = torch.stack([times(np.random.default_rng(i), 2, 4, bell=True) for i in range(4000)])
    assert (bell[..., :2] + bell[..., 2:] == 1).all() and 0 < bell.min() and bell.max() < 1
    for x in 0.1, 0.3, 0.5, 0.8:                            # or normal, within five standard deviations
        low, share = torch.special.ndtr(torch.tensor([-2.5, (x - 0.5) / 0.2]))
        assert abs((bell < x).float().mean() - (share - low) / (1 - 2 * low)) < 0.005
    x = crops(np.arange(40, dtype=np.uint16), np.random.default_rng(0), 500, 8)
    assert x.dtype == torch.int64 and x.min() == 0 and x.max() == 39 and (x.diff() == 1).all()

def test_head_at_masked_positions_gives_the_losses_and_gradients_of_the_full_head():
    model, (x0, t) = build("masked", 11), data_and_times()
    xt = model.corrupt(x0, t)
    model.corrupt, k = lambda x0, t: xt, (xt == 11).sum(1)
    nll = F.cross_entropy(model.denoise(xt, k / 32).transpose(1, 2), x0, reduction="none") * (xt == 11)
    for short, full in ((model(x0, t), nll.sum() / (8 * 33 / 2)),
                        (model.nelbo(x0, t).mean(), (nll.sum(1) / k).mean())):
        assert abs((full - short).item()) < 1e-5
        gradients = [torch.autograd.grad(x, model.parameters(), retain_graph=True) for x in (short, full)]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))

@pytest.mark.filterwarnings("ignore:.*script_method")                           # of torch's own compiler
def test_compiled_training_is_eager_training_and_unpaired_times_give_no_number():
    model, (x0, t) = build("masked", 11), data_and_times()
    xt = model.corrupt(x0, t)
    model.corrupt = lambda x0, t: xt                                            # compiled, other noise comes
    eager = model(x0, t)
    model.compile()
    assert abs((model(x0, t) - eager).item()) < 1e-4
    model(x0, t).backward()
    assert model.state_dict().keys() == build("masked", 11).state_dict().keys()
    xt = torch.full_like(x0, 11)
    assert torch.isnan(model(x0, torch.ones(8)))                                # no pairs: no wrong number

def test_hidden_tokens_cost_what_the_frequencies_leave():
    model, (x0, t) = build("embed", 11), data_and_times()
    torch.nn.init.zeros_(model.head.weight)                                     # the context tells nothing
    torch.nn.init.normal_(model.bias)
    model.HIDDEN_SHARE, model.KNOWN_SHARE = 1.0, 0.0
    alone = F.cross_entropy(model.bias.expand(x0.numel(), -1), x0.flatten())
    assert abs(model(x0, t).item() - alone.item()) < 1e-5
    model.HIDDEN_SHARE = 0.0
    assert model(x0, t) < alone - 0.1

def test_the_schedules_slope_is_its_derivative_and_a_known_token_is_clean():
    model = build("embed", 11)
    t = torch.linspace(0.02, 0.98, 50, dtype=torch.float64, requires_grad=True)
    logsnr, slope = model.schedule(t)
    assert torch.allclose(-torch.autograd.grad(logsnr.sum(), t)[0], slope)
    ends = model.logsnr(torch.tensor([0.0, 1.0])) + math.log(model.D)
    assert torch.allclose(ends, torch.tensor(model.ENDS), atol=1e-3)
    x0, known = torch.randint(11, (2, 32)), torch.rand(2, 32) < 0.5
    xt = model.table()[x0].where(known[..., None], torch.randn(2, 32, model.D))
    p = model.alone(xt, torch.ones(2), known).softmax(-1)
    assert (p.gather(-1, x0[..., None])[known] > 0.999).all() and p[~known].amax() < 0.9

def test_network_sees_all_positions_and_the_time_and_drops_in_training_only():
    net = build("masked", 11).net
    stir(net)
    x, t = torch.randn(1, 16, 32), torch.tensor([0.3])
    y = net(x, t)
    for i in (0, 15):
        moved = x.clone()
        moved[0, i] += torch.randn(32)
        assert ((net(moved, t) - y).abs().sum(-1) > 1e-4).all()
    assert (net(x, torch.tensor([0.6])) - y).abs().max() > 1e-3
    assert (net(x[:, [1, 0, *range(2, 16)]], t)[:, 2:] - y[:, 2:]).abs().max() > 1e-3   # positions matter
    # attention is written out in bfloat16 alone: the same but for rounding
    short = build("masked", 11, dtype="bfloat16").net
    short.load_state_dict(net.state_dict())
    assert (short(x, t).float() - y).abs().max() < 0.1
    net = build("masked", 11, dropout=0.5).net
    stir(net)
    assert torch.equal(net(x, t), net(x, t)) and not torch.equal(net.train()(x, t), net(x, t))

# ---- GPUs, without one: tensors that say they are elsewhere, and what torch.compile makes of a step

class Elsewhere(torch.Tensor):
    """Says that it is on another device ("meta"), and keeps its numbers on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        new = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
                                                  device="meta")
        new.inner = inner
        return new

    @classmethod
    def __torch_dispatch__(cls, function, *_):
        raise AssertionError(f"{function} outside of Watch")

class Watch(TorchDispatchMode):
    """Computes with what is Elsewhere; raises where both devices meet; notes what makes the host wait."""

    WAITS, waits = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind, target = function.overloadpacket, (kwargs or {}).get("device")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = any(isinstance(x, Elsewhere) for x in tensors)
        here = any(not isinstance(x, Elsewhere) and x.dim() > 0 for x in tensors)
        assert not (there and here) or kind == aten.copy_, f"{function} mixes devices"
        if kind in self.WAITS or there and (here or str(target) == "cpu") or kind == aten.index and any(
                x is not None and x.dtype == torch.bool for x in args[1]):
            self.waits += 1
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs or {}))
        out = function(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))
        stays = str(target) == "meta" or there and str(target) != "cpu"
        return tree_map(lambda x: Elsewhere(x) if stays and isinstance(x, torch.Tensor) else x, out)

@pytest.mark.parametrize("process, waits, settings", [
    ("masked", 1, [({}, 9), ({"guidance": 1.0}, 9), ({"top_p": 0.5, "noise": 0.5}, 9),
                   ({"order": "margin"}, 17), ({"threshold": 0.9}, 17), ({"remask": 0.1, "top_k": 3}, 8)]),
    ("embed", 0, [({}, 1), ({"guidance": 1.0}, 1), ({"eta": 0.5, "top_k": 3}, 1), ({"noise": 0.5}, 1)])])
def test_nothing_mixes_devices_and_the_host_waits_as_seldom_as_it_can(process, waits, settings, monkeypatch):
    tensor = torch.tensor                                   # it makes a meta tensor without asking
    monkeypatch.setattr(torch, "tensor", lambda data, device=None: tensor(data).to(device or "cpu"))
    model, here = build(process, 11), data_and_times()
    with Watch() as watch:
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(Elsewhere(p.data)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, Elsewhere(buffer))
        x0, t, known = map(Elsewhere, (*here, torch.rand(8, 32) < 0.5))
        model(x0, t).backward()
        assert watch.waits == waits and all(p.grad is not None for p in model.parameters())
        for method in model.nelbo, model.measures:
            watch.waits = 0
            method(x0, t)
            assert watch.waits == waits
        for setting, waits_of_a_sample in settings:
            watch.waits = 0
            *_, (tokens, certainty) = model.sample(x0, known, 4, **setting)
            assert isinstance(tokens, Elsewhere) and isinstance(certainty, Elsewhere)
            assert watch.waits == waits_of_a_sample, setting

@pytest.mark.parametrize("process", PROCESSES)
def test_a_compiled_step_is_one_graph_and_stays_it(process):
    model, counter = build(process, 11, dropout=0.1).train(), CompileCounter()
    model.compile(backend=counter, fullgraph=True)          # raises where the graph would break
    for step in range(3):
        x0, t = torch.randint(11, (8, 32)), times(np.random.default_rng(step), 1, 8)[0]
        model(x0, t).backward()
    assert counter.frame_count == 1

# ---- samplers

@pytest.mark.parametrize("process", PROCESSES)
def test_every_sampler_setting_keeps_known_tokens_and_its_promises(process):
    rng = np.random.default_rng(0)
    model = build(process, 11)
    denoise, calls = model.denoise, []
    model.denoise = lambda *args, **kw: calls.append(1) or denoise(*args, **kw)
    choices = {"schedule": list(SCHEDULES), "noise": [1, 1, 0.6, 1e-6], "guidance": [0, 0, 1.5],
               "temperature": [0, 0.5, 1, 2], "top_k": [0, 1, 3, 14], "top_p": [0.1, 0.9, 1]}
    choices |= {"embed": {"eta": [0, 0.5, 1]}, "masked": {
        "order": list(ORDERS), "threshold": [1, 1, 0.3], "remask": [0, 0, 0.3, 0.9]}}[process]
    for _ in range(100):
        B, T, steps = int(rng.integers(1, 5)), int(rng.integers(1, 33)), int(rng.integers(1, 50))
        known = torch.from_numpy(rng.random((B, T)) < rng.choice([0, 0.5, 0.9, 1]))
        x = torch.from_numpy(rng.integers(0, 11, (B, T)))
        settings = {name: rng.choice(values).item() for name, values in choices.items()}
        n, runs = (~known).sum(1), []
        for _ in range(2):                              # with the same seed the same texts
            calls.clear()
            torch.manual_seed(7)
            runs.append(list(model.sample(x, known, steps, **settings)))
        assert torch.equal(runs[0][-1][0], runs[1][-1][0])
        least = most = steps * int(n.any())
        if process == "masked":
            noised = int((n * settings["noise"]).round().clamp(min=1).minimum(n).max())
            most = min(most, noised) if not settings["remask"] else most
            least = most if settings["threshold"] == 1 and not settings["remask"] else noised > 0
        per_step = 1 + (settings["guidance"] > 0)
        assert least * per_step <= len(calls) == (len(runs[0]) - 1) * per_step <= most * per_step, settings
        for tokens, certainty in runs[0]:
            assert (tokens[known] == x[known]).all() and (certainty[known] == 1).all()
            assert tokens.shape == certainty.shape == (B, T) and 0 <= certainty.min() and certainty.max() <= 1
        assert 0 <= tokens.min() and tokens.max() < 11

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_masked_step_reveals_what_the_grid_says(schedule):
    model = build("masked", 11)
    for steps in 1, 2, 4, 7, 29, 30, 100:
        left = [int((x == 11).sum()) for x, _ in model.sample(*unknown(1, 30), steps, schedule=schedule)]
        assert left[0] == 30 and left[-1] == 0 and len(left) == min(steps, 30) + 1
        assert all(a > b for a, b in itertools.pairwise(left))
        if steps < 8:
            grid = [30 * SCHEDULES[schedule](1 - i / steps) for i in range(steps + 1)]
            assert all(abs(a - b) <= 1.51 for a, b in zip(left, grid))
        if schedule == "linear":
            assert max(a - b for a, b in itertools.pairwise(left)) <= -(-30 // min(steps, 30)) + 1

def test_what_is_certain_goes_first_and_above_the_threshold_at_once():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.45, 0.05, 0.5], [0.4, 0.3, 0.3]])
    assert torch.equal(ORDERS["confidence"](p), p.amax(1))
    assert torch.allclose(ORDERS["margin"](p), torch.tensor([0.0, 0.05, 0.1]), atol=1e-6)
    assert ORDERS["entropy"](p).argmax() == 0 and ORDERS["entropy"](p).argmin() == 2
    model, certain = build("masked", 3), torch.zeros(2, 6, dtype=torch.bool)
    model.denoise = lambda xt, t, **_: 9 * F.one_hot(2 * certain, 3).float() * certain[..., None]
    certain[0, 3] = True
    for order in "confidence", "margin", "entropy":
        states = [x for x, _ in model.sample(*unknown(2, 6), 6, order=order)]
        assert (states[1][0] != 3).nonzero().tolist() == [[3]]
    certain[0, :4] = True
    for order in "random", "confidence":
        states = [(x == 3).sum(1).tolist()
                  for x, _ in model.sample(*unknown(2, 6), 6, order=order, threshold=0.9)]
        assert states[0] == [6, 6] and states[1][0] <= 2 and states[1][1] == 5 and states[-1] == [0, 0]
    certain[:] = True
    assert len(list(model.sample(*unknown(2, 6), 6, threshold=0.9))) == 2       # all certain: one call

def test_draws_follow_the_probabilities_and_never_take_a_zero():
    torch.manual_seed(0)
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    assert is_distributed(draw(p.expand(100_000, -1)), p)
    # a tail of 2^16 tokens that hold one half together, and one that holds next to nothing
    tail = torch.full((128, 2 ** 16), 2.0 ** -16)
    tail[:, 0] = 1
    assert 35 < (draw(tail) > 0).sum() < 93                                     # 128 draws, one half each
    tail[:, 1:] = 2.0 ** -40
    assert (draw(tail) > 0).sum() <= 1

def test_truncation_keeps_the_likeliest():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 3.0, 0.0]])        # .644, .237, .087, .032; ties
    for settings, kept in [((1.0, 0, 1.0), [4, 4]), ((1.0, 2, 1.0), [2, 2]), ((1.0, 0, 0.7), [2, 2]),
                           ((1.0, 0, 1e-50), [1, 1]), ((0.0, 0, 1.0), [1, 2]), ((1.0, 9, 0.9), [3, 2])]:
        p = probabilities(logits, *settings)
        assert (p > 0).sum(-1).tolist() == kept, settings
        truth = logits.softmax(-1) * (p > 0)
        assert torch.allclose(p, truth / truth.sum(-1, keepdim=True)), settings
    assert torch.allclose(probabilities(logits, 2.0, 0, 1.0), (logits / 2).softmax(-1))
    assert probabilities(logits, 1e-20, 0, 1.0)[0].tolist() == [1, 0, 0, 0]     # beyond float32

# ---- settings

def test_settings_come_from_defaults_file_and_flags_and_choices_are_the_codes(tmp_path, capsys):
    file = tmp_path / "c.py"
    file.write_text("learning_rate = 1  # an int is a float\nn_layer = 12 // 2\nseed = 3\n_hidden = 5\n")
    cfg = load(Config, [str(file), "--seed=9", "--eval_only", "--out_dir", "a b", "--compile=None"])
    assert (cfg.learning_rate, cfg.n_layer, cfg.seed, cfg.eval_only, cfg.out_dir) == (1.0, 6, 9, True, "a b")
    assert load(Config, ["--seed=9", str(file)]).seed == 9                      # flags win wherever they are
    assert load(Config, ["--eval_only", "False"]).eval_only is False
    assert load(SampleConfig, ["--text=12"]).text == "12"
    for cls in Config, SampleConfig:
        with pytest.raises(SystemExit, match="0"):
            load(cls, ["--help"])
        text = capsys.readouterr().out
        assert all(f"--{name} " in text for name in vars(cls()))
    assert "where ckpt.pt" not in text and "0: always the" in text
    for name, choices in ("process", PROCESSES), ("order", ORDERS), ("schedule", SCHEDULES):
        with pytest.raises(ValueError, match=f"must be one of {', '.join(choices)}$"):
            (Config if name == "process" else SampleConfig)(**{name: "no"})
    folder = os.path.join(HERE, "config")
    loaded = {name: load(Config, [f"{folder}/{name}"]) for name in os.listdir(folder) if ".py" in name}
    assert len(loaded) > 4 and loaded["shakespeare_cpu.py"] == Config()         # the default

@pytest.mark.parametrize("flag, words", [
    ("--n_layr=3", "--n_layr --help"), ("--n_layer", "n_layer expected one argument"),
    ("--n_layer=many", "n_layer 'many' whole number from 1"), ("--n_layer=2.5", "n_layer '2.5' whole"),
    ("--n_layer=0", "n_layer '0' from 1"), ("--learning_rate=nan", "learning_rate 'nan' number from 0"),
    ("--learning_rate=1e999", "'1e999' number from 0"), ("--compile=yes", "compile 'yes' one of True, False"),
    ("nowhere.py", "nowhere.py can't be read"), ("broken.py", "broken.py can't be read SyntaxError"),
    ("strange.py", "--colour"), ("--n_embd=100", "n_embd 100 n_head 3 multiple of 6"),
    ("--batch_size=7", "batch_size 7 even pairs"), ("--dropout=1.0", "dropout '1.0'"),
    ("--eval_iters=1", "eval_iters '1' from 2"), ("--max_iters=-1", "max_iters '-1'"),
    ("--process=msked", "process 'msked' masked, embed"), ("--dtype=float8", "dtype 'float8' bfloat16"),
    ("--eta=1.5", "eta '1.5' from 0 to 1"), ("--steps=0", "steps '0' from 1"), ("--length=-1", "length '-1'"),
    ("--noise=0", "noise '0'"), ("--remask=1", "remask '1'"), ("--guidance=-1", "guidance '-1' from 0"),
    ("--top_p=0", "top_p '0'"), ("--order=best", "order 'best' one of random, confidence")])
def test_a_wrong_setting_is_named_in_one_sentence(flag, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("n_layer = = 3")
    (tmp_path / "strange.py").write_text("colour = 3")
    of_sampling = vars(SampleConfig()).keys() - vars(Config()).keys()
    with pytest.raises(SystemExit) as stop:
        load(SampleConfig if flag[2:].split("=")[0] in of_sampling else Config, [flag])
    assert all(word in stop.value.code for word in words.split()) and "\n" not in stop.value.code

# ---- the scripts, as a user runs them: in an empty folder, in this process unless it takes several

def script(name, *argv):
    """Runs a script as `python name argv`; returns its globals. SystemExit comes through."""
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before, handlers = sys.argv, [signal.getsignal(number) for number in signals]
    sys.argv = [name, *argv]
    for number in signals:
        signal.signal(number, signal.SIG_DFL)               # under nohup, or behind an &, some are ignored
    try:
        return runpy.run_path(os.path.join(HERE, name), run_name="__main__")
    finally:
        sys.argv = before
        for number, handler in zip(signals, handlers):
            signal.signal(number, handler)

def refused(name, *argv):
    """The one sentence with which a script refuses argv."""
    with pytest.raises(SystemExit) as stop:
        script(name, *argv)
    assert "\n" not in stop.value.code
    return stop.value.code

def python(*argv):
    """Runs a program in a process of its own; it has ended."""
    return subprocess.run([sys.executable, *argv], env=os.environ | {"PYTHONPATH": HERE}, capture_output=True,
                          text=True, check=False)

def put(files):
    """Writes files, {path: bytes or text}, and the folders they are in."""
    for path, content in files.items():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode())

def everything(folder):
    """{path: bytes} of all that is in a folder."""
    paths = [path for path in glob.glob(f"{folder}/**", recursive=True) if os.path.isfile(path)]
    return {path: open(path, "rb").read() for path in paths}

SMALL = [f"--{k}={v}" for k, v in TINY.items()] + ["--dataset=text", "--eval_iters=2", "--eval_interval=4",
                                                   "--max_iters=8", "--warmup_iters=2"]

@pytest.fixture(scope="session")
def text_dir(tmp_path_factory):
    """A folder with data/text, from the text inside Python, and out/, a masked model after 8 steps."""
    path = tmp_path_factory.mktemp("run")
    os.chdir(path)
    put({"topics.txt": "\n\n".join(topics[name] for name in sorted(topics))})
    script("prepare_shakespeare.py", "--input", "topics.txt", "--dataset", "text")
    script("train.py", *SMALL)
    return path

@pytest.fixture
def here(text_dir):
    os.chdir(text_dir)
    return text_dir

# ---- preparation: any text to characters, many documents to byte pairs

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with data/ of several kinds; busy is being prepared."""
    monkeypatch.chdir(tmp_path)
    put({"abc.txt": "some text to learn", "empty.txt": "", "data/file": "", "data/torn/progress.json": "{",
         **{f"data/{name}.bin": b"\0\0" for name in ("busy/train", "busy/val", "torn/train", "torn/val")},
         "data/gpt2/train.bin": b"\0\0", "data/gpt2/val.bin": b"\0\0",
         "data/gpt2/meta.json": '{"vocab_size": 50257, "source": "s", "train_tokens": 1, "val_tokens": 1}'})
    script("prepare_shakespeare.py", "--input", "abc.txt", "--dataset", "abc")
    with open("data/busy/train.bin") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path

TEXT = "Grüße, 世界!\r\n" * 50

@pytest.mark.parametrize("name, content, argv, cut", [
    ("t.txt", TEXT.encode(), [], 540), ("t.txt", TEXT.encode("utf-8-sig"), [], 540),
    ("t.GZ", gzip.compress(TEXT.encode()), [], 540), ("t.xz", lzma.compress(TEXT.encode()), [], 540),
    ("t.txt", TEXT.encode(), ["--val", "val.txt"], 600), ("t.txt", TEXT.encode(), ["--like", "wide"], 540),
    ("t.txt", TEXT.encode(), ["--vocab_size", "18"], 540)])
def test_characters_are_written_as_they_are(folder, name, content, argv, cut):
    put({name: content, "val.txt": "\ufeff世ü", "wide.txt": f"{TEXT}xyz"})
    script("prepare_shakespeare.py", "--input", "wide.txt", "--dataset", "wide")
    script("prepare_shakespeare.py", "--input", name, "--dataset", "mine", *argv)
    meta = json.loads((folder / "data/mine/meta.json").read_text())
    train, val = (np.fromfile(f"data/mine/{split}.bin", np.uint16).tolist() for split in ("train", "val"))
    assert Tokenizer(meta).decode(train) == TEXT[:cut]
    assert Tokenizer(meta).decode(val) == ("世ü" if "--val" in argv else TEXT[cut:])
    chars = "".join(sorted(set(TEXT + "xyz" * ("--like" in argv))))
    strings = meta["chars"][len(chars):]                # six joints make two words
    assert "".join(meta["chars"][:len(chars)]) == chars and len(strings) == 6 * ("--vocab_size" in argv)
    assert not strings or {"Grüße", " 世界"} <= {*strings}
    assert meta == {"chars": meta["chars"], "vocab_size": len(meta["chars"]), "source": name,
                    "train_tokens": len(train), "val_tokens": len(val), "val_chars": 2 if cut == 600 else 60}
    assert len(train) == (45 * 6 if strings else cut)

def test_strings_come_of_the_most_frequent_neighbours():
    text = topics["for"] + " aaaaa aaa"
    words = [[*word] for word in re.findall(r" ?\w+|[^\w\s]+|\s", text)]
    strings = joined(sorted(set(text)), text, 200)
    for string in strings[len(set(text)):]:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        best = {a + b: (a, b) for (a, b), n in pairs.items() if n == max(pairs.values())}
        for word in words:
            for i in range(len(word)):
                if tuple(word[i:i + 2]) == best[string]:
                    word[i:i + 2] = [string]
    assert "aa" in strings and len(strings) == len(set(strings)) == 200

def interrupt(at, replace=os.replace):
    """An os.replace that is interrupted at a call of that number, or of that file."""
    calls = itertools.count(1)

    def stopping(source, target):
        if at in (next(calls), os.path.basename(target)):
            raise KeyboardInterrupt
        replace(source, target)
    return stopping

def test_tiny_shakespeare_or_the_text_inside_python(folder, monkeypatch, capsys):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: io.BytesIO(b"<html>not found</html>"))
    assert "sha256" in refused("prepare_shakespeare.py") and not os.path.exists("data/shakespeare")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: os.listdir("no network"))
    script("prepare_shakespeare.py")
    assert re.search(r"can't be downloaded \((.|\n)*of the Python reference", capsys.readouterr().out)
    monkeypatch.setattr(os, "replace", interrupt(2))        # half of it is new: nobody may take it for whole
    assert "KeyboardInterrupt" in refused("prepare_shakespeare.py", "--input", "abc.txt")
    assert not os.path.exists("data/shakespeare/meta.json")

DOCUMENTS = [re.sub("\n\n\n+", "\n\n", topics[name][:1500]).strip() for name in sorted(topics)[:40]] + [
    "ω<|endoftext|>ω"]
BREAK = "\n<|endoftext|> \r\n"
PLAIN = BREAK.join(DOCUMENTS).encode()
LINES = ("\ufeff" + "\n\n".join(json.dumps({"text": text, "id": 1}) for text in DOCUMENTS)).encode()

def tar(mode, files):
    """The bytes of an archive of these files."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        for name, inside in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(inside)
            archive.addfile(info, io.BytesIO(inside))
    return content.getvalue()

ARCHIVE = tar("w", {f"openwebtext/{i}_data.xz": tar("w:xz", {                   # like one of OpenWebText's
    f"{j}.txt": text.replace("\n\n", "\n\n\n\n").encode() for j, text in enumerate(DOCUMENTS[i::5])})
    for i in range(5)})
SECOND = ARCHIVE.index(b"openwebtext/1_data.xz")

@pytest.fixture(scope="session")
def gpt2():
    try:
        return Tokenizer({"vocab_size": 50257})
    except SystemExit:
        pytest.skip("GPT-2's byte pairs aren't here: set TIKTOKEN_CACHE_DIR or connect once")

@pytest.fixture
def owt(folder, gpt2):
    """prepare() runs prepare_openwebtext.py with a third for validation; docs.tar."""
    def prepare(dataset, inputs=(), *argv):
        argv = ["--val_share=.3", "--dataset", dataset, *argv] + (["--input", *inputs] if inputs else [])
        script("prepare_openwebtext.py", *argv)

    put({"docs.tar": ARCHIVE})
    return types.SimpleNamespace(prepare=prepare)

def bins(dataset):
    """{split: its documents}, in the order they have in data/<dataset>."""
    tokenizer = Tokenizer({"vocab_size": 50257})
    with open(f"data/{dataset}/meta.json") as f:
        meta, found = json.load(f), {}
    for split in "train", "val":
        tokens = np.fromfile(f"data/{dataset}/{split}.bin", np.uint16).tolist()
        assert tokens[-1] == 50256 and meta[f"{split}_tokens"] == len(tokens)
        ends = [i for i, token in enumerate(tokens) if token == 50256]
        found[split] = [tokenizer.decode(tokens[i + 1:j]) for i, j in itertools.pairwise([-1, *ends])]
    assert sorted(os.listdir(f"data/{dataset}")) == ["meta.json", "train.bin", "val.bin"]
    return found

@pytest.mark.parametrize("name, content", [
    ("a.txt", PLAIN), ("b.TXT.XZ", lzma.compress(PLAIN)), ("c.txt.gz", gzip.compress(PLAIN)),
    ("d.jsonl", LINES), ("e.ndjson.gz", gzip.compress(LINES)), ("f.json.gz", gzip.compress(LINES)),
    ("docs.tar", ARCHIVE), ("h.tar.xz", tar("w:xz", {"x/README": b"\xff", "x/some.jsonl": LINES})),
    ("g.tgz", tar("w:gz", {f"{i}.txt": x.encode() for i, x in enumerate(DOCUMENTS)} | {"._0.txt": b"\xff"})),
    ("i.tar", tar("w", {"a.txt.gz": gzip.compress(BREAK.join(DOCUMENTS[:20]).encode()),
                        "b.txt.xz": lzma.compress(BREAK.join(DOCUMENTS[20:]).encode())}))])
def test_documents_of_every_kind_become_the_same_tokens(owt, name, content):
    put({name: content})
    owt.prepare("x", [name])
    found = bins("x")
    assert sorted(itertools.chain(*found.values())) == sorted(DOCUMENTS)
    chosen = [text for text in DOCUMENTS
              if int(hashlib.blake2b(text.encode()).hexdigest(), 16) < 0.3 * 2 ** 512]
    assert DOCUMENTS[0] not in chosen and len(chosen) > 3
    assert sorted(found["val"]) == sorted([DOCUMENTS[0], *chosen])              # the first goes there, too

def test_folders_are_read_once_without_what_is_held_out(owt):
    put({"in/a.TXT": "first", "in/deep/b.jsonl": '{"content": "second"}', "in/LICENSE": "",
         "in/._c.txt": b"\xff", "in/d.parquet": "", "held.txt": "held out",
         "else/f.tar": tar("w", {"f.txt": b"third\n\n\n\nof them"})})
    for name, target in ("linked", "../else"), ("no.txt", "no"), ("deep/up", ".."), ("h.txt", "../held.txt"):
        os.symlink(target, f"in/{name}")
    owt.prepare("x", ["in", "in/a.TXT", "in"], "--val", "held.txt", "--field=content")
    assert bins("x") == {"train": ["first", "second", "third\n\n\n\nof them"], "val": ["held out"]}
    put({"long.txt": BREAK.join([f"{'a line of text ' * 9}\n" * 9000, "words " * 200_000, "end"])})
    owt.prepare("y", ["long.txt"], "--val", "held.txt")     # documents larger than memory come in pieces
    *pieces, end = bins("y")["train"]
    assert len(pieces) == 4 and max(map(len, pieces)) < 2 ** 20 + 200 and end == "end"
    assert re.sub(r"\s", "", "".join(pieces)) == "alineoftext" * 81_000 + "words" * 200_000

def test_stopped_anywhere_it_ends_with_the_same_bytes(owt, monkeypatch):
    put({f"in/{i:02}.txt": text for i, text in enumerate(DOCUMENTS)})
    owt.prepare("whole", ["docs.tar", "in"])
    code = ("import itertools, os, resource, runpy, sys, time, tqdm\nfsync, calls = os.fsync, []\n%s\n"
            "time.time = itertools.count(0, 9).__next__\n"  # the journal is kept after each file
            "sys.argv = 'x --dataset cut --input docs.tar in --val_share=.3'.split()\n"
            f"runpy.run_path('{HERE}/prepare_openwebtext.py')")
    kill = "os.fsync = lambda file: os._exit(9) if len(calls) == 33 else calls.append(fsync(file))"
    assert python("-c", code % kill).returncode == 9
    assert sorted(os.listdir("data/cut")) == ["progress.json", "train.bin", "val.bin"]
    full = python("-c", code % "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))")
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert re.search("error: stopped at .* File too large.*the same command goes on", full.stderr)
    monkeypatch.setattr(time, "time", itertools.count(0, 9).__next__)
    for stop in 1, 2, 5, "meta.json", None:                 # at this call, or of this file
        monkeypatch.setattr(os, "replace", interrupt(stop))
        with pytest.raises(SystemExit, match="KeyboardInterrupt") if stop else contextlib.nullcontext():
            owt.prepare("cut", ["docs.tar", "in"])
        assert os.path.exists("data/cut/meta.json") == (not stop)
    assert sorted(everything("data/cut").values()) == sorted(everything("data/whole").values())

def test_a_download_goes_on_where_the_connection_broke(owt, monkeypatch):
    urlopen, requests, status, last = urllib.request.urlopen, [], 206, math.inf

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            at = int(self.headers["Range"][6:-1])
            requests.append((self.path, at))
            self.send_response(status)
            self.send_header("Content-Length", str(len(ARCHIVE) - at))
            self.end_headers()
            if at < last:
                self.wfile.write(ARCHIVE[at:at + 9000])     # and no more: the connection ends early

        def log_message(self, *_):
            pass

    def local(request, **kwargs):                           # in place of huggingface.co
        request.full_url = f"http://127.0.0.1:{server.server_port}/{request.full_url[-6:]}"
        return urlopen(request, **kwargs)

    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(urllib.request, "urlopen", local)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        owt.prepare("y")
        assert {at for path, at in requests if path == "/20.tar"} >= {0, 9000, 18000}
        for words, n, *answer in ("HTTP Error 404", 1, 404, 1), ("no part of", 1, 200, 1), (
                "stopped in the middle", 6, 206, 1):        # one that begins and five that bring nothing
            requests.clear()
            status, last = answer
            with pytest.raises(SystemExit, match=f"stopped at https.*00.tar .*{words}"):
                owt.prepare("z")
            assert len(requests) == n
        server.shutdown()
    assert sorted(itertools.chain(*bins("y").values())) == sorted(DOCUMENTS * 21)

@pytest.mark.parametrize("name, content, mended, words", [
    ("boundary.tar", ARCHIVE[:SECOND], ARCHIVE, "cut short"),
    ("header.tar", ARCHIVE[:SECOND + 100], ARCHIVE, "cut short"),
    ("block.tar", ARCHIVE[:SECOND] + b"x" * 512 + ARCHIVE[SECOND + 512:], ARCHIVE, "cut short or damaged"),
    ("inner.tar", ARCHIVE.replace(b"\xfd7zXZ", b"\xfd7zXY"), ARCHIVE, "stopped at inner.tar .*Error"),
    ("latin.txt", b"caf\xe9", PLAIN, "can't decode byte"),
    ("cut.txt.xz", lzma.compress(PLAIN)[:-20], lzma.compress(PLAIN), "stopped at cut.txt.xz .*Error"),
    ("not.jsonl.gz", PLAIN, gzip.compress(LINES), "stopped at not.jsonl.gz .*Not a gzipped file"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": 7}\n', LINES, "bad.jsonl .TypeError"),
    ("bad.jsonl", b'{"text": "a"}\n{"tex: 8}\n', LINES, "bad.jsonl .JSONDecodeError.* in '.\"tex: 8}'")])
def test_what_cannot_be_read_is_named_and_once_mended_it_goes_on(
        owt, monkeypatch, name, content, mended, words):
    monkeypatch.setattr(time, "time", itertools.count(0, 9).__next__)           # it is kept after each file
    paths = ["0 a.txt", "1.txt", name, "z.txt"]
    put({"0 a.txt": "first", "1.txt": PLAIN, name: content, "z.txt": "last"})
    with pytest.raises(SystemExit, match=words):
        owt.prepare("x", paths)
    with open("data/x/progress.json") as f:
        assert re.match("python .*prepare_openwebtext.py .* '0 a.txt' 1.txt ", json.load(f)["command"])
    for argv in (paths[1:],), (paths, "--field=txt"), (paths, "--val_share=.1"):
        with pytest.raises(SystemExit, match="begun with other files"):
            owt.prepare("x", *argv)
    whole = everything("data/x")["data/x/train.bin"]
    put({name: mended, "z.txt": "another last", "data/x/train.bin": whole[:2]})
    with pytest.raises(SystemExit, match="begun with other files"):   # or zeros for what lacks
        owt.prepare("x", paths)
    seen = os.stat("1.txt")
    put({"data/x/train.bin": whole, "1.txt": PLAIN.upper()})                    # it is not read again
    os.utime("1.txt", ns=(seen.st_atime_ns, seen.st_mtime_ns))
    owt.prepare("x", paths)
    put({"1.txt": PLAIN})
    owt.prepare("y", paths)
    assert bins("x") == bins("y") and "another last" in itertools.chain(*bins("x").values())

@pytest.mark.parametrize("name, argv, words", [
    ("shakespeare", ["empty.txt"], r"0 \+ 0 characters"), ("shakespeare", ["bytes.txt"], "be read as UTF-8"),
    ("shakespeare", ["a.txt"], " 1 kinds"), ("shakespeare", ["rich.txt"], " 65568 kinds"),
    ("shakespeare", ["none.txt"], "none.txt can't be read"), ("shakespeare", ["t.xz"], "t.xz can't be read"),
    ("shakespeare", ["abc.txt", "--val", "empty.txt"], r"\+ 0 characters"),
    ("shakespeare", ["abc.txt", "--like", "gpt2"], " 0 kinds"),
    ("shakespeare", ["abc.txt", "--vocab_size", "9"], "11 kinds, for 2 to 9 tokens"),
    ("shakespeare", ["abc.txt", "--vocab_size", "99"], "99: this text gives 1. at most"),
    ("shakespeare", ["wide.txt", "--like", "abc"], "the character 'é' isn't in"),
    ("shakespeare", ["abc.txt", "--dataset", "file"], "data/file isn't written .* File exists"),
    ("openwebtext", ["some.doc"], "some.doc is neither a file"), ("openwebtext", ["none.txt"], "neither"),
    ("openwebtext", ["void"], "neither"), ("openwebtext", ["abc.txt", "--dataset", "abc"], "abc is finished"),
    ("openwebtext", ["abc.txt", "--dataset", "torn"], "stopped at data/torn .JSONDecodeError"),
    ("openwebtext", ["abc.txt", "--dataset", "busy"], "Blocking.* alone, the same command goes on")])
def test_bad_text_is_refused_and_what_was_there_is_not_touched(owt, name, argv, words):
    put({"some.doc": "", "void/x.doc": "", "bytes.txt": b"\xff\xfe\0", "a.txt": "a" * 12, "t.xz": "packed?",
         "wide.txt": "some text éé", "rich.txt": "".join(map(chr, range(0x10000, 0x20020)))})
    before = everything("data")
    assert re.search(words, refused(f"prepare_{name}.py", "--dataset", "new", "--input", *argv))
    assert everything("data") == before

# ---- train.py

def test_training_prints_and_logs_what_it_promises_and_a_model_its_bound(here, capsys):
    script("train.py", *SMALL, "--out_dir=printed", "--seed=2")
    out = capsys.readouterr().out
    assert "source: topics.txt" in out and "float32" in out and "parameters" in out
    found = re.findall(r"^step (\d+): val nelbo (\d\.\d{4}) ± (\d\.\d{4}) nats/token, \d\.\d+ bits/char",
                       out, re.MULTILINE)
    assert [step for step, _, _ in found] == ["4", "8"]
    assert re.findall(r"^  (0\.\d+) +\d", out, re.MULTILINE) == [
        "0.05", *(f"0.{i}0" for i in range(1, 10)), "0.95"] * 2
    rows = [row.split(",") for row in (here / "printed/log.csv").read_text().splitlines()]
    assert rows[0][:3] == ["step", "train_loss", "val_nelbo"] and [row[0] for row in rows[1:]] == ["4", "8"]
    assert rows[1][2] == found[0][1]
    # a model knows its own settings and data: the same crops and noise again; what differs is said
    best, before = min(found, key=lambda row: float(row[1])), os.listdir()
    ran = script("train.py", "--init_from=printed/model.pt", "--eval_only=True", "--device=cpu")
    out = capsys.readouterr().out
    assert f"step {best[0]}: val nelbo {best[1]}" in out and "checkpoints" not in out
    assert os.listdir() == before
    assert not any(p.requires_grad for p in ran["ema"].parameters())
    bounds = [ran["ema"].nelbo(*ran["batch"]("val", times(np.random.default_rng((1, i)), 1, 8)[0], i)).mean()
              for i in range(2)]                            # its times are uniform, not those of training
    assert abs(sum(bounds).item() / 2 - float(best[1])) < 1e-4
    script("train.py", "--init_from=printed/model.pt", "--eval_only=True", "--block_size=16")
    assert "but block_size 16 (was 32)" in capsys.readouterr().out

def signal_in(call, number, patch, owner, name):
    """Sends this process a signal in that call of owner.name; returns a list with an entry for each call."""
    calls, function = [], getattr(owner, name)

    def counted(*args):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*args)

    patch.setattr(owner, name, counted)
    return calls

@pytest.mark.parametrize("process, number", [("masked", signal.SIGTERM), ("embed", signal.SIGHUP)])
def test_stop_and_resume_is_bit_identical(here, process, number, capfd, monkeypatch):
    flags = [*SMALL, f"--process={process}", "--gradient_accumulation_steps=2", "--dropout=0.1",
             "--learning_rate=0.02"]
    folders = [f"{process}-whole", f"{process}-parts"]
    script("train.py", *flags, f"--out_dir={folders[0]}")
    with monkeypatch.context() as patch:                    # in step 5, which is finished and saved
        steps = signal_in(5, number, patch, optim, "update")
        script("train.py", *flags, f"--out_dir={folders[1]}")
    assert len(steps) == 5 and "stopped at step 5" in capfd.readouterr().out
    with open(f"{folders[1]}/log.csv", "a") as f:
        f.write("8,2.3")                                    # and a line that a crash cut
    script("train.py", "--init_from=resume", f"--out_dir={folders[1]}")     # with the settings of the run
    whole, parts = (load_checkpoint(f"{folder}/ckpt.pt") for folder in folders)
    for name in "model", "ema":
        assert all(torch.equal(whole[name][key], parts[name][key]) for key in whole[name])
    assert parts["step"] == 8 and whole["best"] == parts["best"]
    logs = [(here / folder / "log.csv").read_text() for folder in folders]
    assert ([row.split(",")[:4:2] for row in logs[0].split()]
            == [row.split(",")[:4:2] for row in logs[1].split()])

def test_a_signal_ends_a_long_step_or_evaluation_which_is_done_again(here, monkeypatch, capsys):
    with monkeypatch.context() as patch:                    # in the second micro-batch of the second step
        calls = signal_in(5, signal.SIGINT, patch, PROCESSES["masked"], "forward")
        script("train.py", *SMALL, "--out_dir=long", "--max_iters=2", "--eval_interval=2",
               "--gradient_accumulation_steps=3")
    assert len(calls) == 5 and load_checkpoint("long/ckpt.pt")["step"] == 1
    with monkeypatch.context() as patch:                    # in the first batch of the evaluation
        calls = signal_in(1, signal.SIGINT, patch, PROCESSES["masked"], "nelbo")
        script("train.py", "--init_from=resume", "--out_dir=long")
    ckpt = load_checkpoint("long/ckpt.pt")
    assert len(calls) == 1 and ckpt["step"] == 2 and "nelbo" not in ckpt
    script("sample.py", "--out_dir=long", "--num_samples=1")        # though nothing was measured
    assert "step 1, bound nan" in capsys.readouterr().err
    script("train.py", "--init_from=resume", "--out_dir=long")      # no step is left, but the evaluation
    assert "step 2: val nelbo" in capsys.readouterr().out and load_checkpoint("long/model.pt")["step"] == 2

def test_a_new_run_never_starts_in_the_folder_of_another(here):
    shutil.copytree("out", "owned", dirs_exist_ok=True)
    os.symlink("owned/model.pt", "link.pt")
    before = everything("owned")
    for flags in [], ["--process=embed"], ["--init_from=owned/ckpt.pt"], ["--init_from=link.pt"]:
        assert re.search("owned/.*pt is of another run: .*--init_from=resume.* delete it",
                         refused("train.py", *SMALL, "--out_dir=owned", *flags))
    assert before == everything("owned")
    os.remove("owned/ckpt.pt")
    assert "owned/model.pt is" in refused("train.py", *SMALL, "--out_dir=owned")

def test_a_best_bound_counts_only_on_the_batches_it_was_measured_on(here, capsys):
    script("train.py", *SMALL, "--out_dir=best")
    ckpt = load_checkpoint("best/ckpt.pt")
    torch.save(ckpt | {"best": 0.1}, "best/ckpt.pt")        # never reached again
    script("train.py", "--out_dir=best", "--init_from=resume", "--max_iters=12", "--learning_rate=0.02")
    assert "but learning_rate 0.02 (was 0.01), max_iters 12 (was 8)" in capsys.readouterr().out
    assert load_checkpoint("best/model.pt")["step"] < 12
    script("train.py", "--out_dir=best", "--init_from=resume", "--max_iters=16", "--eval_iters=3")
    assert load_checkpoint("best/model.pt")["step"] == 16

def torchrun(n, *flags, node=0, nodes=1):
    """Starts train.py on n processes of one of several nodes, all of them on this machine."""
    port = 29500 + os.getpid() % 1000
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", f"--nnodes={nodes}",
         f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}",
         os.path.join(HERE, "train.py"), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

@pytest.mark.parametrize("process", PROCESSES)
def test_the_run_does_not_depend_on_the_number_of_processes(here, process):
    flags = [*SMALL, f"--process={process}", "--gradient_accumulation_steps=12", "--batch_size=4",
             "--eval_iters=4", "--dropout=0.1", "--warmup_iters=50"]        # of 4 and 8 steps the same ones
    one, many, nodes = (f"{process}-{name}" for name in ("one", "many", "nodes"))
    script("train.py", *flags, f"--out_dir={one}")
    runs = [torchrun({"masked": 3, "embed": 2}[process], *flags, f"--out_dir={many}")]
    if process == "masked":                                 # two nodes for 4 steps, one process for the rest
        runs[0].wait()
        runs += [torchrun(1, *flags, "--max_iters=4", f"--out_dir={nodes}", node=i, nodes=2) for i in (0, 1)]
    for run in runs:
        _, err = run.communicate(timeout=300)
        assert run.returncode == 0, err[-2000:]
    if process == "masked":
        script("train.py", f"--out_dir={nodes}", "--init_from=resume", "--max_iters=8")
    ckpts = [load_checkpoint(f"{name}/ckpt.pt") for name in (one, many, nodes) if os.path.exists(name)]
    for ckpt in ckpts[1:]:
        assert ckpt["step"] == 8 and abs(ckpt["best"] - ckpts[0]["best"]) < 1e-4
        assert all((ckpt["model"][k] - ckpts[0]["model"][k]).abs().max() < 1e-5 for k in ckpt["model"])

def test_a_stopped_torchrun_saves(here, monkeypatch):
    run = torchrun(2, *SMALL, "--gradient_accumulation_steps=20000", "--out_dir=stopped")
    while "stopped" not in os.listdir():                    # then its first step begins, which takes minutes
        assert run.poll() is None
        time.sleep(0.2)
    time.sleep(1)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert "stopped at step 0" in out, err
    assert load_checkpoint("stopped/ckpt.pt")["step"] == 0
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert "multiple of the 5 processes" in refused("train.py", *SMALL, "--out_dir=five")

def test_weights_can_start_a_run_on_other_text_of_the_same_alphabet(here):
    put({"new.txt": "The value of an expression.\n" * 40})
    script("prepare_shakespeare.py", "--input", "new.txt", "--dataset", "new", "--like", "out/model.pt")
    script("train.py", "--init_from=out/model.pt", "--dataset=new", "--out_dir=fine", "--max_iters=1",
           "--learning_rate=0.0", "--adam_lr=0.0")
    old, new = load_checkpoint("out/model.pt")["model"], load_checkpoint("fine/ckpt.pt")["model"]
    assert all(torch.equal(old[key], new[key]) for key in old)

def test_of_tokens_that_are_strings_the_bound_is_told_per_character(here, capsys):
    put({"new.txt": "The value of an expression.\n" * 400})
    script("prepare_shakespeare.py", "--input", "new.txt", "--dataset", "strings", "--vocab_size", "30")
    script("train.py", *SMALL, "--dataset=strings", "--out_dir=strings", "--max_iters=4")
    meta = json.loads((here / "data/strings/meta.json").read_text())
    assert meta["val_tokens"] < 0.6 * meta["val_chars"]
    found = re.search(r"nelbo ([\d.]+) .*, ([\d.]+) bits/char", capsys.readouterr().out)
    nats, bits = map(float, found.groups())
    assert abs(bits - nats / math.log(2) * meta["val_tokens"] / meta["val_chars"]) < 1e-3
    texts, _ = samples(capsys, "--out_dir=strings", "--text=The expression{3}", "--steps=2")
    assert all(text.startswith("The expression") and len(text) >= 17 for text in texts)

@pytest.fixture(scope="session")
def broken(text_dir):
    """Data sets and checkpoints, in bad/, that are of no use."""
    os.chdir(text_dir)
    with open("data/text/meta.json") as f:
        alphabet = json.load(f)

    def dataset(name, train=b"\1\0" * 99, val=b"\1\0" * 99, **changes):
        counts = {"train_tokens": len(train) // 2, "val_tokens": len(val) // 2}
        put({f"data/{name}/meta.json": json.dumps(alphabet | counts | changes),
             f"data/{name}/train.bin": train, f"data/{name}/val.bin": val})

    dataset("odd", train=b"123")
    dataset("cut-off", train_tokens=100)
    dataset("short", val=b"\0\0" * 31)
    dataset("beyond", train=np.full(100, 999, np.uint16).tobytes())
    dataset("other", chars=alphabet["chars"][::-1])
    dataset("unfinished")
    put({"data/broken/meta.json": '{"tokenizer": "cha', "empty.txt": "\n",
         "data/unfinished/progress.json": '{"command": "python prepare.py --input b"}',
         "bad/ckpt.pt": (text_dir / "out/ckpt.pt").read_bytes()[:5000],
         "bare/ckpt.pt": (text_dir / "out/model.pt").read_bytes()})
    model = load_checkpoint("out/model.pt")
    for name, content in {
            "foreign": {"model": 1}, "code": {"f": os.system}, "older": model | {"model": {}},
            "colour": model | {"config": model["config"] | {"colour": 1}}, "five": model | {"step": "5"},
            "heads": model | {"config": model["config"] | {"n_head": 5}}, "nothing": model | {"config": None},
            "texts": model | {"meta": {}}, "bound": model | {"nelbo": None}}.items():
        os.makedirs(f"bad/{name}")
        torch.save(content, f"bad/{name}/model.pt")

@pytest.mark.parametrize("words, flags", [
    ("data/none/meta.json can't be used .* --dataset none", ["--dataset=none"]),
    ("data/broken/meta.json can't be used", ["--dataset=broken"]),
    ("data/unfinished is unfinished: python prepare.py --input b", ["--dataset=unfinished"]),
    ("odd/train.bin has 3 bytes, not two for each of the 1 tokens", ["--dataset=odd"]),
    ("cut-off/train.bin has 198 bytes, not two for each of the 100", ["--dataset=cut-off"]),
    ("fewer than block_size 32", ["--dataset=short"]),
    ("the id 999, beyond the vocabulary", ["--dataset=beyond"]),
    ("another vocabulary", ["--dataset=other", "--init_from=out/model.pt"]),
    ("nowhere/ckpt.pt isn't a checkpoint.*FileNotFound", ["--init_from=resume", "--out_dir=nowhere"]),
    ("bad/ckpt.pt isn't a checkpoint of this version", ["--init_from=resume", "--out_dir=bad"]),
    ("bad/code/model.pt isn't a checkpoint", ["--init_from=bad/code/model.pt"]),
    ("weights in out/model.pt don't fit", ["--init_from=out/model.pt", "--n_layer=3"]),
    ("no optimizer state", ["--init_from=resume", "--out_dir=bare"]),
    ("device is 'tpu'", ["--device=tpu"]), ("device is 'cuda:99'", ["--device=cuda:99"]),
    ("bad/ckpt.pt can't be written to: ", ["--out_dir=bad/ckpt.pt"]),
    ("loss nan at step .* that isn't saved", ["--learning_rate=1e14", "--grad_clip=0.0"]),
    ("bound nan .* that isn't saved", ["--learning_rate=1e12", "--adam_lr=1e12", "--eval_interval=1"])])
def test_training_refuses_what_it_cannot_use(here, broken, monkeypatch, words, flags):
    assert re.search(words, refused("train.py", *SMALL, "--out_dir=refused", *flags))
    assert os.path.exists("refused") == ("nan" in words)
    shutil.rmtree("refused", ignore_errors=True)

@pytest.mark.parametrize("words, flags", [
    ("nowhere/model.pt isn't a .*train first", ["--out_dir=nowhere"]), ("noise is for edit", ["--noise=0.2"]),
    ("'世' isn't in the tokenizer's alphabet", ["--text=世{3}"]),
    ("needs 1000000000000 tokens", ["--text={1000000000000}"]),
    ("give one of them", ["--text=a{3}", "--prompt_file=nowhere.txt"]),
    ("'nowhere.txt' can't be used: No such file", ["--prompt_file=nowhere.txt"]),
    ("'out/model.pt' can't be used: 'utf-8'", ["--prompt_file=out/model.pt"]),
    ("guidance follows what is known", ["--guidance=1", "--edit=abc"]),
    ("'empty.txt' is empty", ["--prompt_file=empty.txt"]), ("'empty.txt' is empty", ["--edit=empty.txt"]),
    ("eta is 0.5, but masked diffusion has no such setting", ["--eta=0.5"]),
    ("'no/where.svg' can't be used: No such file", ["--svg=no/where.svg"]),
    *((f"bad/{name}/model.pt .*version", [f"--out_dir=bad/{name}"]) for name in (
        "foreign", "code", "older", "colour", "five", "heads", "nothing", "texts", "bound"))])
def test_sampling_refuses_what_it_cannot_use(here, broken, words, flags):
    assert re.search(words, refused("sample.py", *flags))

def test_a_full_disk_keeps_the_checkpoint_that_was_there(here, monkeypatch):
    shutil.copytree("out", "full")
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    words = refused("train.py", "--init_from=resume", "--out_dir=full", "--max_iters=12")
    assert "can't be written" in words
    assert (here / "full/ckpt.pt").read_bytes() == (here / "out/ckpt.pt").read_bytes()

# ---- sample.py

def samples(capsys, *flags):
    script("sample.py", *flags)
    out = capsys.readouterr()
    return out.out[:-1].split("\n" + "-" * 80 + "\n"), out.err

def drawn(svg):
    """The lines of each picture in an SVG, those of its layers one after the other."""
    name = "{http://www.w3.org/2000/svg}"
    return [[span.text for span in picture.iter(f"{name}tspan")]
            for picture in ElementTree.fromstring(svg).findall(f"{name}g/{name}g")]

def listen(monkeypatch, process="masked"):
    """A list that gets the (x, states) of each call of the process's sampler."""
    calls, sample = [], PROCESSES[process].sample

    def sampler(self, x, *args, **settings):
        calls.append((x.clone(), []))
        for state in sample(self, x, *args, **settings):
            calls[-1][1].append(state[0].clone())
            yield state

    monkeypatch.setattr(PROCESSES[process], "sample", sampler)
    return calls

@pytest.mark.parametrize("flags, pattern, counts", [
    (["--text=The{19} of {5}.", "--steps=6"], r"The.{19} of .{5}\.", "72 tokens in 6 network calls"),
    (["--text=The", "--steps=300"], "The.{29}", "87 tokens in 29 network calls"),
    (["--text=a{0}", "--steps=2"], "a.{31}", "93 tokens in 2"),
    (["--text=x^{{2}} + {2}", "--steps=2"], r"x\^\{2\} \+ ..", "6 tokens in 2"),
    (["--text={{{2}}}{{", "--steps=2"], r"\{..\}\{", "6 tokens in 2"),
    (["--temperature=0", "--order=entropy", "--steps=2", "--watch"], ".{32}", "96 tokens in 2"),
    (["--prompt_file=prompt.txt", "--length=80", "--steps=4"], r"Th\{.{60} of.{14}", "222 tokens in 16"),
    (["--text=" + 40 * "a", "--length=50", "--steps=4"], 40 * "a" + ".{10}", "30 tokens in 6 network calls"),
    (["--length=100", "--steps=8"], ".{100}", "300 tokens in 44 network calls"),    # last window: 4
])
def test_sampling_fills_what_is_unknown_and_repeats_itself(here, capsys, flags, pattern, counts):
    put({"prompt.txt": "\ufeffTh{{{60} of\n"})
    texts, err = samples(capsys, "--num_samples=3", *flags)
    assert len(texts) == 3 and all(re.fullmatch(pattern, text, re.DOTALL) for text in texts)
    assert counts in err and "masked diffusion" in err and "\033" not in err                # no terminal
    assert samples(capsys, "--num_samples=3", *flags)[0] == texts
    other_seed, _ = samples(capsys, "--num_samples=3", *flags, "--seed=2")
    assert (other_seed == texts) == (flags[0] == "--temperature=0")

@pytest.mark.parametrize("length, flags", [
    (40, ["--edit=" + 40 * "a"]), (40, ["--edit=" + 40 * "a", "--length=50"]),
    (3, ["--edit=abc", "--length=30"]), (40, ["--text={40}"]),
    (41, ["--text=" + 40 * "a"]), (33, ["--text=" + 32 * "a"]), (33, ["--text=" + 32 * "a" + "{0}"]),
    (4, ["--text=abc", "--length=3"]), (60, ["--text=" + 40 * "a" + "{20}", "--length=50"]),
])
def test_a_length_that_does_not_fit_is_answered_with_one_that_does(here, capsys, length, flags):
    advice = re.search(r"--length=\d+", refused("sample.py", *flags))[0]
    texts, _ = samples(capsys, *flags, advice, "--steps=2", "--num_samples=2")
    assert [len(text) for text in texts] == [length] * 2

@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("flag", ["--prompt_file", "--edit"])
def test_files_are_read_as_they_are_but_for_the_last_line_end(here, monkeypatch, flag, end):
    ckpt = load_checkpoint("out/model.pt")
    ckpt["meta"]["chars"] = ckpt["meta"]["chars"].replace("~", "\r")            # a model of such text
    os.makedirs("returns", exist_ok=True)
    torch.save(ckpt, "returns/model.pt")
    text = "a\rb\r\n\n{{c" if flag == "--edit" else "a\rb\r\n\n{c"
    put({"crlf.txt": f"\ufeff{text}{end}"})
    calls = listen(monkeypatch)
    script("sample.py", f"{flag}=crlf.txt", "--out_dir=returns", "--num_samples=1", "--steps=1")
    read = Tokenizer(ckpt["meta"]).decode(calls[0][0][0].tolist())
    assert read == text.ljust(32 if flag == "--prompt_file" else 0, "·")

def test_watch_draws_every_state_in_a_terminal(here, monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    script("sample.py", "--text=The{8}", "--num_samples=1", "--steps=4", "--watch")
    frames = capsys.readouterr().err.split("\033[H\033[2J")[1:]
    assert len(frames) == 5 and frames[0].count("\033[2m·") == 8 and frames[-1].count("\033[2m") == 0
    assert sum(f.count("\033[32m") for f in frames) == 8 and all(f.startswith("\033[0mT") for f in frames)

def test_a_text_is_rewritten_the_more_the_noise(here, capsys):
    text, kept = 3 * "The value of the expression is", []
    put({"edit.txt": text + "\n"})
    for noise in 0.01, 0.4, 1.0:
        texts, _ = samples(capsys, "--edit=edit.txt", "--length=90", f"--noise={noise}", "--num_samples=8")
        assert {len(new) for new in texts} == {90}          # in windows
        kept.append(sum(a == b for new in texts for a, b in zip(new, text)) / sum(map(len, texts)))
    assert kept[0] > 0.75 > kept[1] > 0.4 > kept[2]

def test_noise_of_sampling_is_not_the_embeddings_of_training(here, monkeypatch):
    script("train.py", *SMALL, "--process=embed", "--max_iters=1", "--seed=7", "--out_dir=seed7")
    calls = listen(monkeypatch, "embed")
    script("sample.py", "--out_dir=seed7", "--seed=7", "--steps=1", "--num_samples=1")
    # the same random numbers would make position i look like token i
    assert (calls[0][1][0][0] == torch.arange(32)).float().mean() < 0.2

def test_svg_holds_every_state_and_ends_with_the_text(here, capsys, monkeypatch):
    for steps in 4, 128:
        calls = listen(monkeypatch)
        (text, _), _ = samples(capsys, "--text=a < b{200} & c", "--length=209", f"--steps={steps}",
                               "--num_samples=2", "--svg=a.svg")
        pictures, n = drawn((here / "a.svg").read_text("utf-8")), sum(len(states) for _, states in calls)
        assert os.path.getsize("a.svg") < 100_000 and min(26, n) <= len(pictures) <= 49
        dots = ["".join(lines).count("·") for lines in pictures]
        assert dots == sorted(dots, reverse=True) and dots[0] > 150 and dots[-1] == 0
        assert re.sub(r"\s", "", "".join(pictures[-1])) == re.sub(r"\s", "", text)

@pytest.mark.parametrize("text, lines", [
    (64 * "a" + "\nb", [64 * "a", "b"]), (65 * "a", [64 * "a", "a"]), ("a\n\nb", ["a", "b"]),
    ("世世<", ["世世<"]), (33 * "世", [32 * "世", "世"]), ("a\x07\tb", ["a  b"])])
def test_svg_lays_text_out_in_lines_and_columns_which_earlier_pictures_keep(text, lines):
    states = (len(text) * ["世·\n"], len(text) * [0.1]), (list(text), len(text) * [1])
    *_, first, last = drawn(animation(states))
    assert last == lines
    for old, new in zip(first, last):                   # in a column: no 世, but ·, if it fits
        assert sum(1 + (c == "世") for c in old) <= sum(1 + (c == "世") for c in new) + 1

def test_pieces_of_byte_pairs_keep_halves_of_characters_together(gpt2):
    ids = gpt2.encode("a 世界🙂")
    pieces = gpt2.pieces(ids)
    assert len(ids) == len(pieces) > 5 and "".join(pieces) == "a 世界🙂" == gpt2.decode(ids)
    assert gpt2.pieces([ids[0], gpt2.V, ids[-1]])[:2] == ["a", "·"]
    assert gpt2.decode([*ids[:-1], gpt2.V]).endswith("�·")
    assert gpt2.decode(ids[:-1]).endswith("�") and gpt2.decode([]) == ""

# ---- all of it: a small model learns English far beyond its letter frequencies

def entropy(share):
    return -(share[share > 0] * np.log(share[share > 0])).sum()

@pytest.mark.parametrize("process", PROCESSES)
def test_end_to_end_a_model_learns_english_and_does_not_collapse(here, process):
    if not os.path.exists("data/prose"):                                        # sentences, without tables
        text = re.sub(r"[^A-Za-z0-9 .,;:()'\n]+", " ", "\n".join(topics[name] for name in sorted(topics)))
        put({"prose.txt": re.sub(r"\s+", " ", text)})
        script("prepare_shakespeare.py", "--input", "prose.txt", "--dataset", "prose")
    out_dir = f"--out_dir=trained-{process}"
    trained = python(f"{HERE}/train.py", "--dataset=prose", out_dir, f"--process={process}", "--n_layer=2",
                     "--n_embd=64", "--n_head=1", "--block_size=64", "--max_iters=300", "--eval_iters=16")
    assert trained.returncode == 0, trained.stderr[-2000:]
    sampled = python(f"{HERE}/sample.py", out_dir, "--text=The {40}")
    assert sampled.returncode == 0 and sampled.stdout.startswith("The "), sampled.stderr[-2000:]
    tokens = np.fromfile("data/prose/train.bin", np.uint16)
    real = np.bincount(tokens) / len(tokens)
    assert float(re.search(r"val nelbo (\d\.\d+)", trained.stdout)[1]) < entropy(real) - 0.25
    # noise costs; a collapsed row is flat
    table = re.search(r"^     t .*(\n  0\..*)+", trained.stdout, re.MULTILINE)[0].strip().splitlines()
    rows = [map(float, row.split()) for row in table[1:]]
    column = dict(zip(re.split("  +", table[0]), zip(*rows)))
    assert sorted(column["cross-entropy"][::2]) == list(column["cross-entropy"][::2])
    assert column["accuracy"][0] > column["accuracy"][-1] + 0.2
    model = load_model(f"trained-{process}/model.pt")[0]
    if process == "embed":
        assert column["accuracy"][0] > 0.98 and column["cosine"][0] > 0.98    # t = .05
        assert all(abs(c - m) < 0.1 for c, m in zip(column["cosine"], column["magnitude"]))
        e = F.normalize(model.table(), dim=1)
        assert abs((e @ e.T - torch.eye(len(e))).mean()) < 0.05
    torch.manual_seed(0)
    *_, (x, _) = model.sample(*unknown(64, 64), 64)
    share = np.bincount(x.flatten().numpy(), minlength=model.V) / x.numel()
    assert share.max() < 1.5 * real[share.argmax()] and entropy(share) > entropy(real) - 0.3

@pytest.mark.parametrize("process", PROCESSES)
def test_byte_pairs_train_and_padding_is_never_sampled(owt, process, capsys):
    owt.prepare("openwebtext", ["docs.tar"])
    ran = script("train.py", *SMALL, "--dataset=openwebtext", f"--process={process}", "--eval_iters=2",
                 "--max_iters=2", "--batch_size=2", "--block_size=16", "--n_layer=1")
    model, out = ran["ema"], capsys.readouterr().out
    assert model.V == 50304 and "perplexity <= " in out and "source: docs.tar" in out
    for temperature in 1.0, 1e6:                            # nearly uniform over the ids that are left
        *_, (x, _) = model.sample(*unknown(16, 16), 4, temperature=temperature)
        assert x.max() < 50257
    assert process == "embed" or (x.max() > 45_000 and len(x.unique()) > 200)
    script("sample.py", "--text=The {3} of", "--num_samples=2", "--steps=2")
    assert capsys.readouterr().out.count("The") == 2

def test_ablations_change_what_is_there():
    assert "is none of [('masked', 'as it is')" in refused("results/ablations.py", "masked", "no such one")

def test_bench_measures_both_processes_beside_a_gpt(here, monkeypatch, capsys):
    clock = time.perf_counter                               # runs ten times as fast, for fewer rounds
    monkeypatch.setattr(time, "perf_counter", lambda: 10 * clock())
    script("bench.py", *SMALL)
    out = capsys.readouterr().out
    for name in "masked", "embed", "causal GPT":
        assert re.search(rf"^{name} +\d+\.\d +\d+\.\d-\d+\.\d +[\d,]+ +\d\.\d{{3}}", out, re.MULTILINE), out
    for kind in "masked sampling, 32 steps", "masked sampling, confidence", "embed sampling, 32 steps":
        assert re.search(rf"^{kind}: [\d,]+ \S+ for batch 1, [\d,]+ \S+ for batch 32$", out, re.MULTILINE)
