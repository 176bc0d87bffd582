"""Oracles first: the bound and the samplers against exact answers; then the tools, as a user runs them.

    python -m pytest
"""
import contextlib
import fcntl
import functools
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
import urllib.request
from pydoc_data.topics import topics
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import optim
from config import Config, SampleConfig, load
from data import Tokenizer, crops, load_checkpoint
from diffusion import ORDERS, PROCESSES, SCHEDULES, draw, load_model, probabilities, times
from pictures import animation

HERE = os.path.dirname(os.path.abspath(__file__))
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


# ------------------------------------------------------------------------------------------------------------
# exact posteriors: a first-order Markov chain, where what each position may be follows by forward-backward

V_CHAIN, T_CHAIN = 8, 12
CHAIN = torch.softmax(
    1.5 * torch.randn(V_CHAIN, V_CHAIN, generator=torch.Generator().manual_seed(1)), -1).double()
START = torch.linalg.matrix_power(CHAIN, 200)[0]                                # its stationary distribution
ENTROPY = -(START * START.log()).sum()
ENTROPY_RATE = -(START[:, None] * CHAIN * CHAIN.log()).sum()
CHAIN_NATS = float(ENTROPY + (T_CHAIN - 1) * ENTROPY_RATE) / T_CHAIN            # nats per token of a sequence


def chain_draw(n, T=T_CHAIN):
    x = torch.zeros(n, T, dtype=torch.long)
    x[:, 0] = draw(START.expand(n, -1))
    for i in range(1, T):
        x[:, i] = draw(CHAIN[x[:, i - 1]])
    return x


def chain_posterior(evidence):
    """log p(token | all evidence) at each position; evidence (B, T, V) are likelihoods up to a factor."""
    evidence = evidence.double()
    T = evidence.size(1)
    forward, backward = torch.empty_like(evidence), torch.ones_like(evidence)
    forward[:, 0] = START * evidence[:, 0]
    for i in range(1, T):
        forward[:, i] = forward[:, i - 1] @ CHAIN * evidence[:, i]
        forward[:, i] /= forward[:, i].sum(-1, keepdim=True)
    for i in range(T - 2, -1, -1):
        backward[:, i] = (backward[:, i + 1] * evidence[:, i + 1]) @ CHAIN.T
        backward[:, i] /= backward[:, i].sum(-1, keepdim=True)
    posterior = forward * backward
    return (posterior / posterior.sum(-1, keepdim=True)).log().clamp(min=-60)


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


@torch.no_grad()
def mean_bound(model, batches):
    """Mean nelbo of texts of the chain and its standard error, over so many stratified batches of 64."""
    torch.manual_seed(0)
    means = torch.stack([model.nelbo(chain_draw(64), times(np.random.default_rng(i), 1, 64)[0]).mean()
                         for i in range(batches)])
    return float(means.mean()), float(means.std() / batches ** 0.5)


@pytest.mark.parametrize("process, constants, above", [
    ("masked", {}, 0), ("embed", {}, 0), ("embed", {"CURVE": (30, 9)}, 0), ("embed", {"CURVE": (2, 2)}, 0),
    # a short range of noise: the terms at its ends are worth .07 and .18; z1's marginal is .02 from N(0, I)
    ("embed", {"ENDS": (2, -2)}, 0.02)])
def test_bound_of_the_exact_posterior_is_the_entropy(process, constants, above):
    bound, se = mean_bound(exact_chain(process, **constants), 300)
    assert se < 0.02 and -4 * se < bound - CHAIN_NATS < 4 * se + above


@pytest.mark.parametrize("process", PROCESSES)
def test_bound_of_a_wrong_posterior_is_above_the_entropy(process):
    model = exact_chain(process)
    exact = model.denoise
    model.denoise = lambda xt, t, **more: 0.4 * exact(xt, t, **more)
    bound, se = mean_bound(model, 100)
    assert bound > CHAIN_NATS + 4 * se


def has_the_chains_transitions(x):
    """Whether each share of pairs in x (n, T_CHAIN) is within five standard errors of the chain's."""
    pairs = torch.bincount((x[:, :-1] * V_CHAIN + x[:, 1:]).flatten(), minlength=V_CHAIN ** 2)
    share, expected = pairs.view(V_CHAIN, V_CHAIN) / pairs.sum(), START[:, None] * CHAIN
    se = (expected * (1 - expected) / pairs.sum()).sqrt()
    return bool(((share - expected).abs() < 5 * se).all())


def is_distributed(tokens, weights):
    """Whether tokens (n,) are drawn in proportion to weights, within 4.5 standard errors each."""
    truth = weights / weights.sum()
    share = torch.bincount(tokens, minlength=len(weights)) / len(tokens)
    return bool(((share - truth).abs() < 4.5 * (truth * (1 - truth) / len(tokens)).sqrt() + 1e-9).all())


@pytest.mark.parametrize("process, steps, settings", [
    ("masked", T_CHAIN, {}), ("masked", 150, {"remask": 0.1}), ("masked", 150, {"noise": 0.6}),
    ("masked", T_CHAIN, {"order": "confidence"}), ("masked", T_CHAIN, {"order": "entropy", "threshold": 0.999}),
    ("embed", 100, {}), ("embed", 100, {"eta": 0.0}), ("embed", 100, {"noise": 0.4})])
def test_samples_of_the_exact_posterior_have_the_chains_transitions(process, steps, settings):
    torch.manual_seed(0)
    x, known = chain_draw(3000), torch.zeros(3000, T_CHAIN, dtype=torch.bool)
    *_, (y, _) = exact_chain(process).sample(x, known, steps, **settings)
    kept, chance = float((y == x).float().mean()), float((START ** 2).sum())
    # tokens stay, or are like what they were, where the noise leaves something of them
    assert chance + 0.1 < kept < 0.95 if "noise" in settings else abs(kept - chance) < 0.02
    assert has_the_chains_transitions(y)


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


# ------------------------------------------------------------------------------------------------------------
# exact counts and identities

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

    def nats(masked):
        logits = model.denoise(x0.masked_fill(masked, V), masked.sum(1) / T)
        return F.cross_entropy(logits[0], x0[0], reduction="none")              # (T,)

    chain = []
    for order in itertools.permutations(range(T)):
        masked, total = torch.ones(1, T, dtype=torch.bool), 0
        for i in order:
            total += nats(masked)[i]
            masked[0, i] = False
        chain.append(total / T)
    per_k = []
    for k in range(1, T + 1):
        bounds = []
        for places in itertools.combinations(range(T), k):
            masked = torch.zeros(1, T, dtype=torch.bool)
            masked[0, list(places)] = True
            model.corrupt = lambda x0, t, masked=masked: x0.masked_fill(masked, V)
            bounds.append(model.nelbo(x0, torch.tensor([(k - 0.5) / T])))
        per_k.append(torch.stack(bounds).mean())
    assert abs(torch.stack(per_k).mean() - torch.stack(chain).mean()) < 1e-5


@pytest.mark.parametrize("T", [1, 7, 32, 100, 1000])
def test_masks_are_exact_and_mirrored(T):
    model = build("masked", 5)
    for t in [t for seed in range(20) for t in times(np.random.default_rng(seed), 3, 16)]:
        xt = model.corrupt(torch.zeros(16, T, dtype=torch.long), t)
        k = (xt == 5).sum(1)
        assert torch.equal(k, (t.double() * T).floor().long() + 1) and ((xt == 5) | (xt == 0)).all()
        assert (k[:8] + k[8:] == T + 1).all()
    assert (model.corrupt(torch.zeros(2, T, dtype=torch.long), torch.tensor([0.0, 1.0])) == 5).sum(1).tolist() == [1, T]


def test_times_are_stratified_over_the_whole_step():
    t = times(np.random.default_rng(0), 4, 8)
    assert torch.equal(t[:, :4] + t[:, 4:], torch.ones(4, 4))
    # 16 pairs: no gap beyond two strata, and each micro-batch by itself
    assert (t.flatten().sort().values.diff() < 2 / 16).all()
    assert all((row.sort().values.diff() < 2 / 4 + 1e-3).all() for row in t)
    mean = torch.stack([times(np.random.default_rng(i), 2, 4) for i in range(4000)])
    assert abs(mean.mean() - 0.5) < 1e-3 and abs(mean.var() - 1 / 12) < 2e-3    # each time is uniform


@pytest.mark.parametrize("what", ["bound", "loss"])
def test_head_at_masked_positions_gives_the_loss_and_gradients_of_the_full_head(what):
    model = build("masked", 11)
    x0, t = torch.randint(11, (8, 32)), times(np.random.default_rng(0), 1, 8)[0]
    torch.manual_seed(1)
    short = model(x0, t) if what == "loss" else model.nelbo(x0, t).mean()
    short.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    xt = model.corrupt(x0, t)
    k = (xt == 11).sum(1)
    nll = F.cross_entropy(model.denoise(xt, k / 32).transpose(1, 2), x0, reduction="none") * (xt == 11)
    full = nll.sum() / (8 * 33 / 2) if what == "loss" else (nll.sum(1) / k).mean()
    full.backward()
    assert abs((full - short).item()) < 1e-5
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(gradients, model.parameters()))


def test_compiled_training_is_eager_training_and_unpaired_times_give_no_number():
    x0, t = torch.randint(11, (8, 32)), times(np.random.default_rng(0), 1, 8)[0]
    model = build("masked", 11)
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
    model = build("embed", 11)
    x0, t = torch.randint(11, (8, 32)), times(np.random.default_rng(0), 1, 8)[0]
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


# ------------------------------------------------------------------------------------------------------------
# network

def test_network_sees_all_positions_both_ways_and_the_time():
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


def test_dropout_drops_in_training_only():
    model = build("masked", 11, dropout=0.5)
    stir(model.net)
    x, t = torch.randint(11, (2, 32)), torch.rand(2)
    assert torch.equal(model.denoise(x, t), model.denoise(x, t))
    model.train()
    assert not torch.equal(model.denoise(x, t), model.denoise(x, t))


# ------------------------------------------------------------------------------------------------------------
# samplers

@pytest.mark.parametrize("process", PROCESSES)
def test_every_sampler_setting_keeps_known_tokens_and_its_promises(process):
    rng = np.random.default_rng(0)
    model = build(process, 11)
    denoise, calls = model.denoise, []
    model.denoise = lambda *args, **kw: calls.append(1) or denoise(*args, **kw)
    for _ in range(200):
        B, T, steps = int(rng.integers(1, 5)), int(rng.integers(1, 33)), int(rng.integers(1, 50))
        known = torch.from_numpy(rng.random((B, T)) < rng.choice([0, 0.5, 0.9, 1]))
        x = torch.from_numpy(rng.integers(0, 11, (B, T)))
        settings = {"schedule": str(rng.choice(list(SCHEDULES))),
                    "noise": float(rng.choice([1, 1, 0.6, 0.01])),
                    "guidance": float(rng.choice([0, 0, 1.5])),
                    "temperature": float(rng.choice([0, 0.5, 1, 2])),
                    "top_k": int(rng.integers(0, 15)), "top_p": float(rng.choice([0.1, 0.9, 1]))}
        if process == "embed":
            settings["eta"] = float(rng.choice([0, 0.5, 1]))
        else:
            settings["order"] = str(rng.choice(list(ORDERS)))
            settings["threshold"] = float(rng.choice([1, 1, 0.3]))
            settings["remask"] = float(rng.choice([0, 0, 0.3, 0.9]))
        calls.clear()
        torch.manual_seed(7)
        states = list(model.sample(x, known, steps, **settings))
        n = (~known).sum(1)
        least = most = steps * int(n.any())
        if process == "masked":
            noised = int((n * settings["noise"]).round().clamp(min=1).minimum(n).max())
            most = min(most, noised) if not settings["remask"] else most
            least = most if settings["threshold"] == 1 and not settings["remask"] else noised > 0
        per_step = 1 + (settings["guidance"] > 0)
        assert least * per_step <= len(calls) <= most * per_step, settings
        assert (len(states) - 1) * per_step == len(calls)
        for tokens, certainty in states:
            assert (tokens[known] == x[known]).all() and (certainty[known] == 1).all()
            assert tokens.shape == certainty.shape == (B, T) and 0 <= certainty.min() and certainty.max() <= 1
        assert 0 <= tokens.min() and tokens.max() < 11
        torch.manual_seed(7)
        *_, (again, _) = model.sample(x, known, steps, **settings)
        assert torch.equal(again, tokens)


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


def test_threshold_reveals_at_once_what_is_certain():
    model = build("masked", 3)
    logits = torch.zeros(2, 6, 3)
    logits[0, :4, 2] = 9
    model.denoise = lambda xt, t, **_: logits
    for order in "random", "confidence":
        states = [(x == 3).sum(1).tolist()
                  for x, _ in model.sample(*unknown(2, 6), 6, order=order, threshold=0.9)]
        assert states[0] == [6, 6] and states[1][0] <= 2 and states[1][1] == 5 and states[-1] == [0, 0]
    model.denoise = lambda xt, t, **_: 9 * F.one_hot(torch.zeros_like(xt), 3).float()
    assert len(list(model.sample(*unknown(2, 6), 6, threshold=0.9))) == 2       # all certain: one call


def test_orders_rank_by_their_measure():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.45, 0.05, 0.5], [0.4, 0.3, 0.3]])
    assert torch.equal(ORDERS["confidence"](p), p.amax(1))
    assert torch.allclose(ORDERS["margin"](p), torch.tensor([0.0, 0.05, 0.1]), atol=1e-6)
    assert ORDERS["entropy"](p).argmax() == 0 and ORDERS["entropy"](p).argmin() == 2
    model = build("masked", 3)
    logits = torch.zeros(1, 6, 3)
    logits[0, 3, 2] = 9                     # position 3 alone is certain, and so it is revealed first
    model.denoise = lambda xt, t, **_: logits
    for order in "confidence", "margin", "entropy":
        states = [x for x, _ in model.sample(*unknown(1, 6), 6, order=order)]
        assert (states[1] != 3).nonzero().tolist() == [[0, 3]]


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


def test_embed_survives_steps_closer_than_float32():
    model = build("embed", 11)
    x = torch.randint(11, (2, 32))
    for noise, schedule in (1e-6, "linear"), (1e-4, "cosine"):
        *_, (y, certainty) = model.sample(x, unknown(2, 32)[1], 64, noise=noise, schedule=schedule)
        assert (y == x).float().mean() > 0.95 and certainty.isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# settings

def test_settings_come_from_defaults_file_and_flags(tmp_path, capsys):
    file = tmp_path / "c.py"
    file.write_text("learning_rate = 1  # an int is a float\nn_layer = 12 // 2\nseed = 3\n_hidden = 5\n")
    cfg = load(Config, [str(file), "--seed=9", "--eval_only", "--out_dir", "a b", "--compile=None"])
    assert (cfg.learning_rate, cfg.n_layer, cfg.seed, cfg.eval_only, cfg.out_dir) == (1.0, 6, 9, True, "a b")
    assert load(Config, ["--seed=9", str(file)]).seed == 9                      # flags win wherever they are
    assert load(Config, ["--eval_only", "False"]).eval_only is False
    assert load(SampleConfig, ["--text=12"]).text == "12"
    for cls in Config, SampleConfig:
        with pytest.raises(SystemExit) as stop:
            load(cls, ["--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and all(f"--{name} " in text for name in vars(cls()))
    assert "where ckpt.pt" not in text and "0: always the" in text


def test_choices_and_configs_are_those_of_the_code():
    for name, choices in ("process", PROCESSES), ("order", ORDERS), ("schedule", SCHEDULES):
        with pytest.raises(ValueError, match=f"must be one of {', '.join(choices)}$"):
            (Config if name == "process" else SampleConfig)(**{name: "no"})
    folder = os.path.join(HERE, "config")
    loaded = {name: load(Config, [os.path.join(folder, name)]) for name in os.listdir(folder) if ".py" in name}
    assert len(loaded) > 4 and loaded["shakespeare_cpu.py"] == Config()         # the default


@pytest.mark.parametrize("cls, argv, words", [
    (Config, ["--n_layr=3"], "--n_layr --help"),
    (Config, ["--n_layer=many"], "n_layer 'many' whole number from 1"),
    (Config, ["--n_layer=2.5"], "n_layer '2.5' whole"),
    (Config, ["--n_layer=0"], "n_layer '0' from 1"),
    (Config, ["--learning_rate=1e999"], "learning_rate '1e999' number from 0"),
    (Config, ["--learning_rate=nan"], "learning_rate 'nan' number from 0"),
    (Config, ["--compile=yes"], "compile 'yes' one of True, False, None"),
    (Config, ["--n_layer"], "n_layer expected one argument"),
    (Config, ["nowhere.py"], "nowhere.py can't be read"),
    (Config, ["broken.py"], "broken.py can't be read SyntaxError"),
    (Config, ["strange.py"], "--colour"),
    (Config, ["--n_embd=100", "--n_head=3"], "n_embd 100 n_head 3 multiple of 6"),
    (Config, ["--batch_size=7"], "batch_size 7 even pairs"),
    (Config, ["--dropout=1.0"], "dropout '1.0'"),
    (Config, ["--eval_iters=1"], "eval_iters '1' from 2"),
    (Config, ["--max_iters=-1"], "max_iters '-1'"),
    (Config, ["--process=msked"], "process 'msked' masked, embed"),
    (Config, ["--dtype=float8"], "dtype 'float8' bfloat16"),
    (SampleConfig, ["--eta=1.5"], "eta '1.5' from 0 to 1"),
    (SampleConfig, ["--steps=0"], "steps '0' from 1"),
    (SampleConfig, ["--length=-1"], "length '-1' from 0"),
    (SampleConfig, ["--noise=0"], "noise '0'"),
    (SampleConfig, ["--remask=1"], "remask '1'"),
    (SampleConfig, ["--guidance=-1"], "guidance '-1' from 0"),
    (SampleConfig, ["--top_p=0"], "top_p '0'"),
    (SampleConfig, ["--order=best"], "order 'best' one of random, confidence"),
])
def test_a_wrong_setting_is_named_in_one_sentence(cls, argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("n_layer = = 3")
    (tmp_path / "strange.py").write_text("colour = 3")
    with pytest.raises(SystemExit) as stop:
        load(cls, argv)
    assert all(word in stop.value.code for word in words.split()) and "\n" not in stop.value.code


# ------------------------------------------------------------------------------------------------------------
# the scripts, as a user runs them: in an empty folder, in this process unless it takes several

def script(name, *argv):
    """Runs a script as `python name argv`; returns its globals. SystemExit comes through."""
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before, handlers = sys.argv, [signal.getsignal(number) for number in signals]
    sys.argv = [name, *argv]
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


SMALL = [f"--{k}={v}" for k, v in TINY.items()] + ["--dataset=text", "--eval_iters=2", "--eval_interval=4",
                                                   "--max_iters=8", "--warmup_iters=2"]


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory):
    """A folder with data/text, from the text inside Python, and out/, a masked model after 8 steps."""
    path = tmp_path_factory.mktemp("run")
    os.chdir(path)
    script("prepare_shakespeare.py", "--offline", "--dataset", "text")
    script("train.py", *SMALL)
    return path


@pytest.fixture
def here(text_dir):
    os.chdir(text_dir)
    return text_dir


# ------------------------------------------------------------------------------------------------------------
# preparation: any text to characters, many documents to byte pairs

def put(files):
    """Writes files, {path: bytes}, and the folders they are in."""
    for path, content in files.items():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as f:
            f.write(content)


def everything():
    """{path: bytes} of all that is in data/."""
    paths = [path for path in glob.glob("data/**", recursive=True) if os.path.isfile(path)]
    return {path: open(path, "rb").read() for path in paths}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with data/ of every kind; one of them is being prepared."""
    monkeypatch.chdir(tmp_path)
    put({"abc.txt": b"some text to learn", "data/file": b"", "data/busy/x": b"", "empty.txt": b"",
         "data/gpt2/train.bin": b"", "data/gpt2/val.bin": b"",
         "data/gpt2/meta.json": json.dumps({"tokenizer": "gpt2", "vocab_size": 50257, "source": "s",
                                            "train_tokens": 0, "val_tokens": 0}).encode(),
         "data/dl/progress.json": b'{"tokenizer": "gpt2"}'})
    script("prepare_shakespeare.py", "--input", "abc.txt", "--dataset", "abc")
    lock = os.open("data/busy", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield tmp_path
    os.close(lock)


TEXT = "Grüße, 世界!\r\n" * 50


@pytest.mark.parametrize("name, content, argv, cut", [
    ("t.txt", TEXT.encode(), [], 540), ("t.txt", TEXT.encode("utf-8-sig"), [], 540),
    ("t.GZ", gzip.compress(TEXT.encode()), [], 540), ("t.xz", lzma.compress(TEXT.encode()), [], 540),
    ("t.txt", TEXT.encode(), ["--val", "val.txt"], 600), ("t.txt", TEXT.encode(), ["--like", "wide"], 540)])
def test_characters_are_written_as_they_are(folder, monkeypatch, name, content, argv, cut):
    put({name: content, "val.txt": "\ufeff世ü".encode(), "wide.txt": f"{TEXT}xyz".encode()})
    script("prepare_shakespeare.py", "--input", "wide.txt", "--dataset", "wide")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))    # a poor terminal
    script("prepare_shakespeare.py", "--input", name, "--dataset", "mine", *argv)
    meta = json.loads((folder / "data/mine/meta.json").read_text())
    train, val = (np.fromfile(f"data/mine/{split}.bin", np.uint16).tolist() for split in ("train", "val"))
    assert Tokenizer(meta).decode(train) == TEXT[:cut]
    assert Tokenizer(meta).decode(val) == ("世ü" if "--val" in argv else TEXT[cut:])
    assert (meta["train_tokens"], meta["val_tokens"], meta["source"]) == (cut, len(val), name)
    assert meta["chars"] == "".join(sorted(set(TEXT + "xyz" * ("--like" in argv))))
    assert meta["vocab_size"] == len(meta["chars"])


def test_tiny_shakespeare_or_the_text_inside_python(folder, monkeypatch, capsys):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: io.BytesIO(b"<html>not found</html>"))
    with pytest.raises(SystemExit, match="sha256"):
        script("prepare_shakespeare.py")
    assert not os.path.exists("data/shakespeare")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: os.listdir("no network"))
    script("prepare_shakespeare.py")
    assert "can't be downloaded (" in capsys.readouterr().out
    assert "Python" in json.loads((folder / "data/shakespeare/meta.json").read_text())["source"]


@pytest.mark.parametrize("content, argv, words", [
    (b"", [], "0 characters"), (b"\xff\xfe\x00", [], "can't be read as UTF-8"), (b"a" * 12, [], "1 distinct"),
    ("".join(map(chr, range(0x10000, 0x20020))).encode(), [], "65,568 distinct"),
    (b"some text", ["--input", "none.txt"], "none.txt can't be read"),
    (b"not packed", ["--input", "t.xz"], "t.xz can't be read"),
    (b"a longer text", ["--val", "empty.txt"], "0 to val"), (b"some text", ["--like", "gpt2"], "gpt2 lacks"),
    (b"some text \xc3\xa9\xc3\xa9", ["--like", "abc"], "abc lacks .*'é' 2 times"),
    (b"some text to learn", ["--dataset", "gpt2"], "is of gpt2 tokens"),
    (b"some text to learn", ["--dataset", "dl"], "is of gpt2 tokens"),
    (b"some text to learn", ["--dataset", "busy"], "by another process"),
    (b"some text to learn", ["--dataset", "file"], "can't be written")])
def test_bad_text_is_refused_and_nothing_written(folder, content, argv, words):
    put({"t.txt": content, "t.xz": content})
    before = everything()
    with pytest.raises(SystemExit, match=words):
        script("prepare_shakespeare.py", "--input", "t.txt", "--dataset", "new", *argv)
    assert everything() == before


DOCUMENTS = [re.sub("\n\n\n+", "\n\n", topics[name][:1500]).strip() for name in sorted(topics)[:40]] + [
    "ω<|endoftext|>ω"]
PLAIN = "\n<|endoftext|> \r\n".join(DOCUMENTS).encode()
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


@pytest.fixture
def owt(folder, monkeypatch):
    """prepare_openwebtext, a third for validation, journal after each file; docs.tar, like OpenWebText's."""
    if not (os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")):
        try:
            Tokenizer({"vocab_size": 50257})
        except SystemExit:
            pytest.skip("GPT-2's byte pairs aren't here: set TIKTOKEN_CACHE_DIR or connect once")
    import prepare_openwebtext as module
    monkeypatch.setattr(module, "prepare", functools.partial(module.prepare, val_share=0.3))
    monkeypatch.setattr(module, "KEEP_SECONDS", 0)
    put({"docs.tar": tar("w", {
        f"openwebtext/{i}_data.xz": tar("w:xz", {f"{j}.txt": text.replace("\n\n", "\n\n\n\n").encode()
                                                 for j, text in enumerate(DOCUMENTS[i::5])})
        for i in range(5)})})
    return module


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
        assert len(found[split]) == meta[f"{split}_documents"]
    assert sorted(os.listdir(f"data/{dataset}")) == ["meta.json", "train.bin", "val.bin"]
    return found


@pytest.mark.parametrize("name, content", [
    ("a.txt", PLAIN), ("b.TXT.XZ", lzma.compress(PLAIN)), ("c.txt.gz", gzip.compress(PLAIN)),
    ("d.jsonl", LINES), ("e.ndjson.gz", gzip.compress(LINES)), ("f.json.gz", gzip.compress(LINES)), ("docs.tar", None),
    ("g.tgz", tar("w:gz", {f"{i}.txt": text.encode() for i, text in enumerate(DOCUMENTS)}
                  | {"._0.txt": b"\xff"})),
    ("h.tar.xz", tar("w:xz", {"x/README": b"\xff", "x/some.jsonl": LINES}))])
def test_documents_of_every_kind_become_the_same_tokens(owt, name, content):
    put({name: content} if content else {})
    owt.prepare("x", [name])
    found = bins("x")
    assert sorted(found["train"] + found["val"]) == sorted(DOCUMENTS) and len(found["val"]) > 3
    assert set(found["val"]) == {
        text for text in DOCUMENTS
        if int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) < 0.3 * 2 ** 64}


def test_folders_are_read_once_without_what_is_held_out(owt, monkeypatch, capsys):
    put({"in/a.TXT": b"first", "in/deep/b.jsonl": b'{"content": "second"}', "in/LICENSE": b"",
         "in/._c.txt": b"\xff", "in/d.parquet": b"", "in/e.Parquet": b"", "held.txt": b"held out", "else/f.txt": b"third"})
    os.symlink("../else", "in/linked")
    os.symlink("../nowhere.txt", "in/dead.txt")
    os.symlink("..", "in/deep/loop")
    os.symlink("../held.txt", "in/held.txt")
    owt.prepare("x", ["in", "in/a.TXT", "in"], ["held.txt"], field="content")
    assert bins("x") == {"train": ["first", "second", "third"], "val": ["held out"]}
    assert re.search("LEFT OUT.* 2 of .parquet, 1 of no ending", capsys.readouterr().out)
    monkeypatch.setattr(owt, "LONGEST", 30)             # a document larger than memory comes in pieces
    put({"long.txt": b"\n<|endoftext|>\n".join([b"0123456789 123456789\n" * 9, b"end"])})
    owt.prepare("x", ["long.txt"], val_share=0)         # and the last one is for validation, if none is
    assert ("".join(bins("x")["train"]).count("89"), bins("x")["val"]) == (18, ["end"])
    assert max(map(len, bins("x")["train"])) < 70


def test_stopped_anywhere_it_ends_with_the_same_bytes(owt, monkeypatch):
    put({f"in/{i:02}.txt": text.encode() for i, text in enumerate(DOCUMENTS)})
    replace = os.replace
    owt.prepare("whole", ["in", "docs.tar"], val_share=0)
    owt.prepare("cut", ["docs.tar"])                        # an older data set stays until there is a new one
    code = ("import os, prepare_openwebtext as p\np.KEEP_SECONDS, fsync, calls = 0, os.fsync, []\n"
            "os.fsync = lambda file: os._exit(9) if len(calls) == 33 else calls.append(fsync(file))\n"
            "p.prepare('cut', ['in', 'docs.tar'], val_share=0)")
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": HERE}, check=False)
    assert killed.returncode == 9 and os.path.exists("data/cut/progress.json")
    for stop in 1, 2, 9, "train.bin", "val.bin", "meta.json", None:     # at this call, or of this file
        calls = itertools.count(1)

        def stopping(source, target, stop=stop, calls=calls):
            if stop in (next(calls), os.path.basename(target)):
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", stopping)
        with pytest.raises(SystemExit, match="interrupted") if stop else contextlib.nullcontext():
            owt.prepare("cut", ["in", "docs.tar"], val_share=0)
        assert os.path.exists("data/cut/meta.json") == (not isinstance(stop, str))
    assert bins("cut") == bins("whole")


def test_a_download_goes_on_where_the_connection_broke(owt, monkeypatch):
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with open("docs.tar", "rb") as f:
                content = f.read()
            at = int(self.headers["Range"][6:-1])
            requests.append((self.path, at))
            self.send_response(206 if self.path < "/21" else 404)
            self.send_header("Content-Length", str(len(content) - at))
            self.end_headers()
            self.wfile.write(content[at:at + 9000])         # and no more: the connection ends early

        def log_message(self, *_):
            pass

    monkeypatch.setattr(time, "sleep", lambda _: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(owt, "URL", address + "/{:02d}.tar")
        owt.prepare("y")
        assert {at for path, at in requests if path == "/20.tar"} >= {0, 9000, 18000}
        monkeypatch.setattr(owt, "URL", address + "/2{:02d}.tar")
        with pytest.raises(SystemExit, match="can't be read .download failed: HTTP Error 404"):
            owt.prepare("z")
        server.shutdown()
    owt.prepare("x", ["docs.tar"])
    assert bins("y") == {split: texts * 21 for split, texts in bins("x").items()}


def damaged(kind):
    """docs.tar, damaged in one way."""
    with open("docs.tar", "rb") as f:
        archive = f.read()
    second = archive.index(b"openwebtext/1_data.xz")
    return {"boundary": archive[:second], "header": archive[:second + 100], "middle": archive[:second + 1000],
            "block": archive[:second] + b"x" * 512 + archive[second + 512:],
            "inner": archive.replace(b"\xfd7zXZ", b"\xfd7zXY")}[kind]


@pytest.mark.parametrize("name, content, words", [
    ("boundary.tar", None, "cut short"), ("header.tar", None, "cut short"),
    ("middle.tar", None, "unexpected end"), ("block.tar", None, "cut short or damaged"), ("inner.tar", None, "can't be read"),
    ("cut.txt.xz", lzma.compress(PLAIN)[:-20], "can't be read"), ("not.jsonl.gz", PLAIN, "can't be read"),
    ("latin.txt", b"caf\xe9", "can't decode byte"),
    ("number.jsonl", b'{"text": 7}\n', "line 1: not a JSON object"),
    ("bad.jsonl", b'{"text": "a"}\n{"txt": 1}\n', "bad.jsonl, line 2: not a JSON object")])
def test_what_cannot_be_read_is_named_and_once_mended_it_goes_on(owt, monkeypatch, name, content, words):
    monkeypatch.setattr(sys, "argv", ["prepare_openwebtext.py", "--input", "a b"])
    put({"0.txt": b"first", "1.txt": PLAIN, name: content or damaged(name[:-4]), "z.txt": b"last"})
    paths = ["0.txt", "1.txt", name, "z.txt"]
    with pytest.raises(SystemExit, match=words):
        owt.prepare("x", paths)
    with open("data/x/progress.json") as f:
        journal = json.load(f)
    assert journal["command"] == "python prepare_openwebtext.py --input 'a b'" and journal["read"] < 3
    assert not os.path.exists("data/x/meta.json")
    shutil.copy("docs.tar", name) if content is None else put(
        {name: {"xz": lzma.compress, "gz": gzip.compress}.get(name[-2:], bytes)(LINES if "json" in name else PLAIN)})
    if journal["read"]:                                     # what is done must be as it was
        for paths_, settings in ([*paths[1:]], {}), (paths, {"field": "txt"}), (paths, {"val_share": 0.1}):
            with pytest.raises(SystemExit, match="isn't as it was"):
                owt.prepare("x", paths_, **settings)
    put({"z.txt": b"another last"})
    owt.prepare("x", paths)
    owt.prepare("y", paths)
    assert bins("x") == bins("y") and "another last" in [*bins("x")["train"], *bins("x")["val"]]


@pytest.mark.parametrize("argv, words", [
    (["some.doc"], "some.doc is neither a file"), (["void"], "void is neither"), (["nowhere.txt"], "neither"),
    (["empty.txt"], "no text for train.bin"), (["abc.txt"], "no text for val.bin"),
    (["two.txt", "--val", "empty.txt"], "no text for val.bin"), (["two.txt", "--val", "two.txt"], "for train.bin"),
    (["two.txt", "--dataset", "abc"], "is of chars tokens"),
    (["two.txt", "--dataset", "busy"], "by another process"),
    (["two.txt", "--dataset", "file"], "can't be written")])
def test_what_was_there_before_is_not_touched(owt, argv, words):
    put({"some.doc": b"", "void/x.doc": b"", "two.txt": b"some\n<|endoftext|>\ntexts"})
    script("prepare_openwebtext.py", "--input", "two.txt", "--dataset", "x")
    assert bins("x") == {"train": ["some"], "val": ["texts"]}
    before = everything()
    with pytest.raises(SystemExit, match=words):
        script("prepare_openwebtext.py", "--dataset", "x", "--input", *argv)
    assert everything() == before


def test_a_full_disk_is_one_sentence_and_can_be_taken_up(owt):
    code = ("import resource, prepare_openwebtext as p; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
            "p.prepare('x', ['docs.tar'], val_share=0.3)")
    full = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": HERE},
                          capture_output=True, text=True, check=False)
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert "data/x can't be written (File too large): make room" in full.stderr
    assert not os.path.exists("data/x/train.bin")
    owt.prepare("x", ["docs.tar"])
    owt.prepare("y", ["docs.tar"])
    assert bins("x") == bins("y")


def test_many_small_files_do_not_wait_for_the_journal(owt, monkeypatch):
    put({f"in/{i}.txt": b"a text" for i in range(300)})
    replace, sizes = owt.replace_file, []
    monkeypatch.setattr(owt, "KEEP_SECONDS", 2)
    monkeypatch.setattr(owt, "replace_file", lambda *a: replace(*a) or sizes.append(len(a[1])))
    owt.prepare("x", ["in"])
    assert len(sizes) < 10 and max(sizes) < 1000            # nor does it grow with the number of files


# ------------------------------------------------------------------------------------------------------------
# train.py

def test_crops_and_times_of_a_step_are_drawn_apart_and_cover_the_split(here):
    batch = script("train.py", *SMALL, "--max_iters=1", "--out_dir=apart")["batch"]
    starts, offsets = [], []
    for step in range(200):
        starts.append(np.random.default_rng((0, 1, step, 0)).integers(0, 10 ** 6, 8))
        offsets.append(times(np.random.default_rng((1, 1, step)), 1, 8)[0, :1].numpy() % 0.25)
    together = np.corrcoef(np.concatenate([np.array(starts), np.array(offsets)], 1).T)[-1, :-1]
    assert abs(together).max() < 0.3
    assert not torch.equal(batch("train", 1, 0, 0), batch("train", 1, 0, 1))
    assert torch.equal(batch("train", 1, 0, 1), batch("train", 1, 0, 1))
    x = crops(np.arange(40, dtype=np.uint16), np.random.default_rng(0), 500, 8)
    assert x.dtype == torch.int64 and x.min() == 0 and x.max() == 39 and (x.diff() == 1).all()


def test_training_prints_and_logs_what_it_promises_and_a_model_its_bound(here, capsys):
    script("train.py", *SMALL, "--out_dir=printed", "--seed=2")
    out = capsys.readouterr().out
    assert "source: the Python reference" in out and "float32" in out and "parameters" in out
    found = re.findall(r"^step (\d+): val nelbo (\d\.\d{4}) ± (\d\.\d{4}) nats/token, \d\.\d+ bits/char",
                       out, re.MULTILINE)
    assert [step for step, _, _ in found] == ["4", "8"]
    assert re.findall(r"^  (0\.\d+) +\d", out, re.MULTILINE) == [
        "0.05", *(f"0.{i}0" for i in range(1, 10)), "0.95"] * 2
    rows = [row.split(",") for row in (here / "printed/log.csv").read_text().splitlines()]
    assert rows[0][:3] == ["step", "train_loss", "val_nelbo"] and [row[0] for row in rows[1:]] == ["4", "8"]
    assert rows[1][2] == found[0][1]
    # a model knows its own settings and data: the same crops and noise again; what differs is said
    best = min(found, key=lambda row: float(row[1]))
    before = os.listdir()
    ran = script("train.py", "--init_from=printed/model.pt", "--eval_only=True", "--device=cpu")
    out = capsys.readouterr().out
    assert f"step {best[0]}: val nelbo {best[1]}" in out and "checkpoints" not in out and before == os.listdir()
    assert not any(p.requires_grad for p in ran["ema"].parameters())
    script("train.py", "--init_from=printed/model.pt", "--eval_only=True", "--block_size=16")
    assert "but block_size 16 (was 32)" in capsys.readouterr().out


def in_step(number, action, monkeypatch):
    """Calls action() in that optimizer step of the run to come; returns a list with an entry for each step."""
    steps, update = [], optim.update

    def counted(*args):
        steps.append(1)
        if len(steps) == number:
            action()
        update(*args)

    monkeypatch.setattr(optim, "update", counted)
    return steps


@pytest.mark.parametrize("process, number", [("masked", signal.SIGTERM), ("embed", signal.SIGHUP)])
def test_stop_and_resume_is_bit_identical(here, process, number, capfd, monkeypatch):
    flags = [*SMALL, f"--process={process}", "--gradient_accumulation_steps=2", "--dropout=0.1",
             "--learning_rate=0.02"]
    folders = [f"{process}-whole", f"{process}-parts"]
    script("train.py", *flags, f"--out_dir={folders[0]}")
    with monkeypatch.context() as patch:                    # a signal in step 5: it is finished and saved
        steps = in_step(5, lambda: os.kill(os.getpid(), number), patch)
        script("train.py", *flags, f"--out_dir={folders[1]}")
    out, err = capfd.readouterr()
    assert len(steps) == 5 and "stopped at step 5" in out and err.count("stopping after this step") == 1
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
    script("train.py", "--init_from=resume", f"--out_dir={folders[1]}")
    assert "step 8 of 8 is done" in capfd.readouterr().out


def test_a_signal_ends_a_long_step_or_evaluation_which_is_done_again(here, monkeypatch, capsys):
    flags = [*SMALL, "--out_dir=long", "--max_iters=2", "--eval_interval=2"]
    calls, forward = [], PROCESSES["masked"].forward

    def stop_in_second(self, x0, t):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, x0, t)

    with monkeypatch.context() as patch:                    # in the second micro-batch of the second step
        patch.setattr(PROCESSES["masked"], "forward", stop_in_second)
        script("train.py", *flags, "--gradient_accumulation_steps=3")
    assert len(calls) == 5 and load_checkpoint("long/ckpt.pt")["step"] == 1
    nelbo, evaluated = PROCESSES["masked"].nelbo, []

    def stop_in_first(self, x0, t):
        evaluated.append(os.kill(os.getpid(), signal.SIGINT))
        return nelbo(self, x0, t)

    with monkeypatch.context() as patch:                    # in the first batch of the evaluation
        patch.setattr(PROCESSES["masked"], "nelbo", stop_in_first)
        script("train.py", "--init_from=resume", "--out_dir=long")
    ckpt = load_checkpoint("long/ckpt.pt")
    assert len(evaluated) == 1 and ckpt["step"] == 2 and "nelbo" not in ckpt
    script("sample.py", "--out_dir=long", "--num_samples=1")        # though nothing was measured
    assert "step 1, bound not measured" in capsys.readouterr().err
    script("train.py", "--init_from=resume", "--out_dir=long")      # no step is left, but the evaluation
    assert "step 2: val nelbo" in capsys.readouterr().out and load_checkpoint("long/model.pt")["step"] == 2


def test_a_new_run_never_starts_in_the_folder_of_another(here):
    shutil.copytree("out", "owned", dirs_exist_ok=True)
    os.symlink("owned/model.pt", "link.pt")
    before = {name: (here / "owned" / name).read_bytes() for name in os.listdir("owned")}
    for flags in [], ["--process=embed"], ["--init_from=owned/ckpt.pt"], ["--init_from=link.pt"]:
        words = refused("train.py", *SMALL, "--out_dir=owned", *flags)
        assert all(word in words for word in ("step 8", "--init_from=resume", "--out_dir", "delete owned"))
    os.remove("owned/ckpt.pt")
    assert "step" in refused("train.py", *SMALL, "--out_dir=owned")
    del before["ckpt.pt"]
    assert before == {name: (here / "owned" / name).read_bytes() for name in os.listdir("owned")}


def test_a_best_bound_counts_only_on_the_batches_it_was_measured_on(here, capsys):
    script("train.py", *SMALL, "--out_dir=best")
    ckpt = load_checkpoint("best/ckpt.pt")
    torch.save(ckpt | {"best": 0.1}, "best/ckpt.pt")        # never reached again
    script("train.py", "--out_dir=best", "--init_from=resume", "--max_iters=12", "--learning_rate=0.02")
    out = capsys.readouterr().out
    assert "but learning_rate 0.02 (was 0.01), max_iters 12 (was 8)" in out and "anew" not in out
    assert load_checkpoint("best/model.pt")["step"] < 12
    script("train.py", "--out_dir=best", "--init_from=resume", "--max_iters=16", "--eval_iters=3")
    assert "anew" in capsys.readouterr().out and load_checkpoint("best/model.pt")["step"] == 16


def torchrun(n, *flags, node=0, nodes=1):
    """Starts train.py on n processes of one of several nodes, all of them on this machine."""
    port = 29500 + os.getpid() % 1000
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", f"--nnodes={nodes}",
         f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}",
         os.path.join(HERE, "train.py"), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*runs):
    for run in runs:
        _, err = run.communicate(timeout=300)
        assert run.returncode == 0, err[-2000:]


def differ(a, b):
    """The greatest difference of two checkpoints' weights."""
    a, b = load_checkpoint(f"{a}/ckpt.pt"), load_checkpoint(f"{b}/ckpt.pt")
    assert a["step"] == b["step"]
    return max(float((a["model"][k] - b["model"][k]).abs().max()) for k in a["model"])


@pytest.mark.parametrize("process", PROCESSES)
def test_the_run_does_not_depend_on_the_number_of_processes(here, process):
    flags = [*SMALL, f"--process={process}", "--gradient_accumulation_steps=12", "--batch_size=4",
             "--eval_iters=4", "--dropout=0.1", "--warmup_iters=50"]
    one, three, nodes, down = (f"{process}-{name}" for name in ("one", "three", "nodes", "down"))
    script("train.py", *flags, f"--out_dir={one}")
    finish(torchrun(3, *flags, f"--out_dir={three}"))
    finish(*(torchrun(2, *flags, f"--out_dir={nodes}", node=node, nodes=2) for node in (0, 1)))
    # a checkpoint of 2 processes resumes on 1; warm-up alone decides these steps
    finish(torchrun(2, *flags, f"--out_dir={down}", "--max_iters=4"))
    script("train.py", f"--out_dir={down}", "--init_from=resume", "--max_iters=8")
    for name in three, nodes, down:
        assert differ(one, name) < 1e-5, name
        best = [load_checkpoint(f"{folder}/ckpt.pt")["best"] for folder in (one, name)]
        assert abs(best[0] - best[1]) < 1e-4


def test_a_stopped_torchrun_saves_and_a_killed_one_ends(here, monkeypatch):
    flags = [*SMALL, "--gradient_accumulation_steps=20000", "--max_iters=100000", "--out_dir=stopped"]
    run = torchrun(2, *flags)                               # a step takes minutes
    while "stopped" not in os.listdir():
        assert run.poll() is None
        time.sleep(0.2)
    time.sleep(2)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert "stopped at step 0" in out and err.count("stopping after this step") == 1
    assert load_checkpoint("stopped/ckpt.pt")["step"] == 0
    run = torchrun(2, "--init_from=resume", "--out_dir=stopped", "--gradient_accumulation_steps=2")
    while load_checkpoint("stopped/ckpt.pt")["step"] == 0:
        assert run.poll() is None
        time.sleep(0.2)
    workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode != 0 and "Signal 9 (SIGKILL)" in err
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert "multiple of the 5 processes" in refused("train.py", *SMALL, "--out_dir=five")


def test_weights_can_start_a_run_on_other_text_of_the_same_alphabet(here):
    with open("new.txt", "w") as f:
        f.write("The value of an expression.\n" * 40)
    script("prepare_shakespeare.py", "--input", "new.txt", "--dataset", "new", "--like", "out/model.pt")
    script("train.py", "--init_from=out/model.pt", "--dataset=new", "--out_dir=fine", "--max_iters=1",
           "--learning_rate=0.0", "--adam_lr=0.0")
    old, new = load_checkpoint("out/model.pt")["model"], load_checkpoint("fine/ckpt.pt")["model"]
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_training_refuses_what_it_cannot_use(here, monkeypatch):
    alphabet = json.loads((here / "data/text/meta.json").read_text())

    def dataset(name, train=b"\1\0" * 99, val=b"\1\0" * 99, **changes):
        folder = here / "data" / name
        folder.mkdir(exist_ok=True)
        counts = {"train_tokens": len(train) // 2, "val_tokens": len(val) // 2}
        (folder / "meta.json").write_text(json.dumps(alphabet | counts | changes))
        (folder / "train.bin").write_bytes(train)
        (folder / "val.bin").write_bytes(val)

    dataset("odd", train=b"123")
    dataset("cut-off", train_tokens=100)
    dataset("short", val=b"\0\0" * 31)
    dataset("beyond", train=np.full(100, 999, np.uint16).tobytes())
    dataset("other", chars=alphabet["chars"][::-1])
    dataset("broken")
    (here / "data/broken/meta.json").write_text('{"tokenizer": "cha')
    dataset("unfinished")
    (here / "data/unfinished/progress.json").write_text('{"command": "python prepare.py --input b"}')
    (here / "bad").mkdir(exist_ok=True)
    model = load_checkpoint("out/model.pt")
    for name, content in {"foreign": {"model": 1}, "code": {"f": os.system}, "older": model | {"model": {}},
                          "strange": model | {"config": {"colour": 1}}, "five": model | {"step": "5"}}.items():
        torch.save(content, f"bad/{name}.pt")
    (here / "bad/ckpt.pt").write_bytes((here / "out/ckpt.pt").read_bytes()[:5000])
    (here / "bare").mkdir(exist_ok=True)
    shutil.copy("out/model.pt", "bare/ckpt.pt")
    monkeypatch.setenv("CXX", "no-compiler")
    for words, *flags in [
        ("data/none/meta.json can't be used .* --dataset none", "--dataset=none"),
        ("data/broken/meta.json can't be used", "--dataset=broken"),
        ("data/unfinished is unfinished: python prepare.py --input b", "--dataset=unfinished"),
        ("odd/train.bin has 3 bytes, not two for each of the 1 tokens", "--dataset=odd"),
        ("cut-off/train.bin has 198 bytes, not two for each of the 100", "--dataset=cut-off"),
        ("fewer than block_size 32", "--dataset=short"),
        ("the id 999, beyond the vocabulary", "--dataset=beyond"),
        ("another vocabulary", "--dataset=other", "--init_from=out/model.pt"),
        ("no checkpoint nowhere/ckpt.pt", "--init_from=resume", "--out_dir=nowhere"),
        ("bad/ckpt.pt isn't a checkpoint of this version, or not all", "--init_from=resume", "--out_dir=bad"),
        *((f"bad/{name}.pt isn't a checkpoint", f"--init_from=bad/{name}.pt")
          for name in ("foreign", "code", "strange", "five")),
        ("weights in bad/older.pt don't fit", "--init_from=bad/older.pt"),
        ("weights in out/model.pt don't fit", "--init_from=out/model.pt", "--n_layer=3"),
        ("no optimizer state", "--init_from=resume", "--out_dir=bare"),
        ("device is 'tpu'", "--device=tpu"), ("device is 'cuda:99'", "--device=cuda:99"),
        ("compile needs a C.. compiler.* --compile=False", "--compile"),
        ("bad/ckpt.pt can't be written to: ", "--out_dir=bad/ckpt.pt"),
        ("loss is nan at step .* keeps the last good", "--learning_rate=1e14", "--grad_clip=0.0"),
    ]:
        if not any("out_dir" in flag for flag in flags):
            flags.append("--out_dir=refused")
        assert re.search(words, refused("train.py", *SMALL, *flags)), words
    assert os.listdir("refused") == ["log.csv"]             # of the last one alone, which never saved


def test_a_full_disk_keeps_the_checkpoint_that_was_there(here, monkeypatch):
    script("train.py", *SMALL, "--out_dir=full", "--max_iters=4")
    before = (here / "full/ckpt.pt").read_bytes()
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    words = refused("train.py", "--init_from=resume", "--out_dir=full", "--max_iters=8")
    assert "can't be written" in words and (here / "full/ckpt.pt").read_bytes() == before


# ------------------------------------------------------------------------------------------------------------
# sample.py

def samples(capsys, *flags):
    script("sample.py", *flags)
    out = capsys.readouterr()
    return out.out[:-1].split("\n" + "-" * 80 + "\n"), out.err


def drawn(svg):
    """The lines of each picture in an SVG, those of its layers one after the other."""
    name = "{http://www.w3.org/2000/svg}"
    return [[span.text for span in picture.iter(f"{name}tspan")]
            for picture in ElementTree.fromstring(svg).findall(f"{name}g/{name}g")]


def listen(monkeypatch, process="masked", stop=None):
    """A list that gets the (x, states) of each call of the process's sampler; interrupted at state stop."""
    calls, sample = [], PROCESSES[process].sample

    def sampler(self, x, *args, **settings):
        calls.append((x.clone(), []))
        for state in sample(self, x, *args, **settings):
            if len(calls[-1][1]) == stop:
                raise KeyboardInterrupt
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
    (here / "prompt.txt").write_text("\ufeffTh{{{60} of\n", encoding="utf-8")
    texts, err = samples(capsys, "--num_samples=3", *flags)
    assert len(texts) == 3 and all(re.fullmatch(pattern, text, re.DOTALL) for text in texts)
    assert counts in err and "masked diffusion" in err and "\033" not in err                # no terminal
    assert samples(capsys, "--num_samples=3", *flags)[0] == texts
    other_seed, _ = samples(capsys, "--num_samples=3", *flags, "--seed=2")
    assert (other_seed == texts) == (flags[0] == "--temperature=0")


@pytest.mark.parametrize("words, flags", [
    ("no checkpoint nowhere/model.pt", ["--out_dir=nowhere"]),
    (b"'\\u4e16' isn't in the tokenizer's alphabet".decode("unicode_escape"), ["--text=世{3}"]),
    ("needs 1000000000000 tokens", ["--text={1000000000000}"]),
    ("give one of them", ["--text=a{3}", "--prompt_file=nowhere.txt"]),
    ("'nowhere.txt' can't be used: No such file", ["--prompt_file=nowhere.txt"]),
    ("'out/model.pt' can't be used: 'utf-8'", ["--prompt_file=out/model.pt"]),
    ("guidance follows what is known", ["--guidance=1", "--edit=abc"]),
    ("noise is for edit", ["--noise=0.2"]),
    ("'empty.txt' is empty", ["--prompt_file=empty.txt"]),
    ("'empty.txt' is empty", ["--edit=empty.txt"]),
    ("eta is 0.5, but masked diffusion has no such setting", ["--eta=0.5"]),
    ("'no/where.svg' can't be used: No such file", ["--svg=no/where.svg"]),
])
def test_sampling_refuses_what_it_cannot_use(here, words, flags):
    (here / "empty.txt").write_text("\n")
    with pytest.raises(SystemExit) as stop:
        script("sample.py", *flags)
    assert words in stop.value.code and "\n" not in stop.value.code


@pytest.mark.parametrize("length, flags", [
    (40, ["--edit=" + 40 * "a"]), (40, ["--edit=" + 40 * "a", "--length=50"]),
    (3, ["--edit=abc", "--length=30"]), (40, ["--text={40}"]),
    (41, ["--text=" + 40 * "a"]), (33, ["--text=" + 32 * "a"]), (33, ["--text=" + 32 * "a" + "{0}"]),
    (4, ["--text=abc", "--length=3"]), (60, ["--text=" + 40 * "a" + "{20}", "--length=50"]),
])
def test_a_length_that_does_not_fit_is_answered_with_one_that_does(here, capsys, length, flags):
    with pytest.raises(SystemExit) as stop:
        script("sample.py", *flags)
    advice = re.search(r"--length=\d+", stop.value.code)[0]
    texts, _ = samples(capsys, *flags, advice, "--steps=2", "--num_samples=2")
    assert [len(text) for text in texts] == [length] * 2


@pytest.mark.parametrize("change", [{"config": {"colour": 1}}, {"config": {"n_head": 5}}, {"meta": {}},
                                    {"config": None}, {"nelbo": None}, {"model": {}}])
def test_sampling_refuses_models_of_other_versions(here, change):
    os.makedirs("other", exist_ok=True)
    ckpt = load_checkpoint("out/model.pt")
    for key, value in change.items():
        ckpt[key] = ckpt[key] | value if key == "config" and value else value
    torch.save(ckpt, "other/model.pt")
    with pytest.raises(SystemExit) as stop:
        script("sample.py", "--out_dir=other")
    assert "other/model.pt" in stop.value.code and "version" in stop.value.code


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("flag", ["--prompt_file", "--edit"])
def test_files_are_read_as_they_are_but_for_the_last_line_end(here, monkeypatch, flag, end):
    ckpt = load_checkpoint("out/model.pt")
    ckpt["meta"]["chars"] = ckpt["meta"]["chars"].replace("~", "\r")            # a model of such text
    os.makedirs("returns", exist_ok=True)
    torch.save(ckpt, "returns/model.pt")
    text = "a\rb\r\n\n{{c" if flag == "--edit" else "a\rb\r\n\n{c"
    (here / "crlf.txt").write_bytes(b"\xef\xbb\xbf" + text.encode() + end.encode())
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
    text = "The value of the expression is"
    (here / "edit.txt").write_text(3 * text + "\n")
    kept = []
    for noise, flags in (0.01, [f"--edit={text}"]), (0.4, [f"--edit={text}"]), (1.0, [f"--edit={text}"]), (
            0.01, ["--edit=edit.txt", "--length=90"]):                          # the last in windows
        texts, _ = samples(capsys, *flags, f"--noise={noise}", "--num_samples=8")
        assert {len(new) for new in texts} == {90 if "90" in flags[-1] else 30}
        kept.append(sum(a == b for new in texts for a, b in zip(new, 3 * text)) / sum(map(len, texts)))
    assert kept[0] > 0.75 > kept[1] > 0.4 > kept[2] and kept[3] > 0.85


def test_noise_of_sampling_is_not_the_embeddings_of_training(here, monkeypatch):
    script("train.py", *SMALL, "--process=embed", "--max_iters=1", "--seed=7", "--out_dir=seed7")
    calls = listen(monkeypatch, "embed")
    script("sample.py", "--out_dir=seed7", "--seed=7", "--steps=1", "--num_samples=1")
    # the same random numbers would make position i look like token i
    assert (calls[0][1][0][0] == torch.arange(32)).float().mean() < 0.2


def test_an_interrupted_run_prints_what_it_has(here, capsys, monkeypatch):
    calls = listen(monkeypatch, stop=3)
    texts, err = samples(capsys, "--text=The{20}", "--steps=20", "--num_samples=2", "--svg=stopped.svg")
    assert len(texts) == 2 and len(calls) == 1 and "interrupted" in err
    assert all(text.startswith("The") and text.count("·") == 18 for text in texts)
    assert len(drawn((here / "stopped.svg").read_text("utf-8"))) == 4


def test_samples_come_in_batches_that_fit(here, capsys, monkeypatch):
    calls = listen(monkeypatch)
    texts, _ = samples(capsys, "--num_samples=10000", "--steps=1")
    sizes = [len(x) for x, _ in calls]
    assert len(texts) == 10_000 == sum(sizes) and len(set(texts)) > 9_900
    assert max(sizes) < 10_000 and len(set(sizes[:-1])) == 1


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


def test_pieces_of_byte_pairs_keep_halves_of_characters_together():
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("needs GPT-2's byte pairs (TIKTOKEN_CACHE_DIR)")
    tokenizer = Tokenizer({"tokenizer": "gpt2", "vocab_size": 50257})
    ids = tokenizer.encode("a 世界🙂")
    pieces = tokenizer.pieces(ids)
    assert len(ids) == len(pieces) > 5 and "".join(pieces) == "a 世界🙂" == tokenizer.decode(ids)
    assert tokenizer.pieces([ids[0], tokenizer.V, ids[-1]])[:2] == ["a", "·"]
    assert tokenizer.decode([*ids[:-1], tokenizer.V]).endswith("�·")
    assert tokenizer.decode(ids[:-1]).endswith("�") and tokenizer.decode([]) == ""


# ------------------------------------------------------------------------------------------------------------
# all of it: a small model learns English far beyond its letter frequencies

@pytest.fixture(scope="session", params=PROCESSES)
def trained(request, text_dir):
    """What train.py prints, and the folder of a model of 64 channels after 400 steps."""
    os.chdir(text_dir)
    folder = f"trained-{request.param}"
    if not os.path.exists("data/prose"):                                        # sentences, without tables
        text = re.sub(r"[^A-Za-z0-9 .,;:()'\n]+", " ", "\n".join(topics[name] for name in sorted(topics)))
        with open("prose.txt", "w") as f:
            f.write(re.sub(r"\s+", " ", text))
        script("prepare_shakespeare.py", "--input", "prose.txt", "--dataset", "prose")
    run = subprocess.run([sys.executable, os.path.join(HERE, "train.py"), "--dataset=prose",
                          f"--out_dir={folder}", f"--process={request.param}", "--block_size=64",
                          "--n_layer=2", "--n_embd=64", "--n_head=1", "--max_iters=400", "--eval_iters=32",
                          "--eval_interval=400"],
                         capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout, folder


def test_end_to_end_through_the_command_line(here, trained):
    out, folder = trained
    tokens = np.fromfile("data/prose/train.bin", np.uint16)
    p = np.bincount(tokens) / len(tokens)
    unigram = -(p[p > 0] * np.log(p[p > 0])).sum()
    bound = float(re.search(r"val nelbo (\d\.\d+)", out).group(1))
    assert bound < unigram - 0.25, (bound, unigram)
    run = subprocess.run([sys.executable, os.path.join(HERE, "sample.py"), f"--out_dir={folder}",
                          "--text=The {40}"],
                         capture_output=True, text=True, check=False)
    assert run.returncode == 0 and run.stdout.startswith("The "), run.stderr[-2000:]


def test_a_trained_model_has_not_collapsed(here, trained):
    out, folder = trained
    table = [[float(v) for v in row.split()] for row in re.findall(r"^  0\.[\d. -]+$", out, re.MULTILINE)]
    names = ["t", *re.split("  +", re.search(r"^     t +(.*)$", out, re.MULTILINE).group(1))]
    column = {name: [row[i] for row in table] for i, name in enumerate(names)}
    # noise costs; a collapsed row is flat
    assert column["cross-entropy"] == sorted(column["cross-entropy"])
    assert column["accuracy"][0] > column["accuracy"][-1] + 0.2
    model = load_model(f"{folder}/model.pt")[0]
    if "cosine" in column:
        assert column["accuracy"][0] > 0.99 and column["cosine"][0] > 0.99
        assert all(abs(c - m) < 0.1 for c, m in zip(column["cosine"], column["magnitude"]))
        e = F.normalize(model.table(), dim=1)
        assert abs((e @ e.T - torch.eye(len(e))).mean()) < 0.05
    torch.manual_seed(0)
    *_, (x, _) = model.sample(*unknown(64, 64), 64)
    tokens = np.fromfile("data/prose/train.bin", np.uint16)
    share, real = (np.bincount(ids, minlength=model.V) / len(ids) for ids in (x.flatten().numpy(), tokens))
    assert share.max() < 1.5 * real[share.argmax()]
    assert (-(share[share > 0] * np.log(share[share > 0])).sum()
            > -(real[real > 0] * np.log(real[real > 0])).sum() - 0.3)


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


def test_bench_measures_both_processes_beside_a_gpt(here, capsys):
    script("bench.py", *SMALL)
    out = capsys.readouterr().out
    for name in "masked", "embed", "causal GPT":
        assert re.search(rf"^{name} +\d+\.\d +\d+\.\d-\d+\.\d +[\d,]+ +\d\.\d{{3}}", out, re.MULTILINE), out
    speed = r"[\d,]+ tokens/s \(\d+% of it the loop's own work\) for batch "
    for kind in "masked sampling, 32 steps", "masked sampling, confidence", "embed sampling, 32 steps":
        assert re.search(f"^{kind}: {speed}1, {speed}32$", out, re.MULTILINE), out
