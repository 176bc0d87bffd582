"""Oracles first: the bound and the samplers against exact answers; then the tools, as a user runs them.

    python -m pytest
"""
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
from pydoc_data.topics import topics
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config import Config, SampleConfig, load
from data import Tokenizer, crops, load_checkpoint, load_model
from diffusion import PROCESSES, SCHEDULES, choose, draw, probabilities, surety, times, top
from pictures import animation

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "batch_size": 8, "dtype": "float32",
        "device": "cpu"}
torch.set_num_threads(1)                    # models this small: more threads only wait for each other,
os.environ["OMP_NUM_THREADS"] = "1"         # for minutes if another program needs a core


def build(process, V, **settings):
    torch.manual_seed(0)
    return PROCESSES[process](Config(process=process, **TINY | settings), V).eval()


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


def exact_chain(process):
    """The process with its network replaced by the chain's posterior."""
    model = build(process, V_CHAIN, block_size=T_CHAIN)
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


def set_schedule(model, name):
    """Gives an Embed another density of logsnr: as it starts, narrow in the middle, or steeply falling."""
    bins = torch.linspace(0, 1, model.BINS)
    shape = {"uniform": torch.ones_like(bins), "narrow": torch.exp(-(8 * (bins - 0.6)) ** 2),
             "falling": torch.exp(-3 * bins)}[name]
    model.sums.copy_(torch.stack((1e6 * shape, torch.full_like(bins, 1e6))))
    model.adapt(lambda tensor: tensor)


@torch.no_grad()
def mean_bound(model, x0, repeats=1):
    """Mean nelbo of x0 and its standard error over stratified batches of 64."""
    means = [model.nelbo(part, times(np.random.default_rng(i), 1, len(part))[0]).mean()
             for i, part in enumerate(x0.repeat(repeats, 1).split(64))]
    return float(torch.stack(means).mean()), float(torch.stack(means).std() / len(means) ** 0.5)


@pytest.mark.parametrize("process, schedule", [("masked", None), ("embed", "uniform"), ("embed", "narrow"),
                                               ("embed", "falling")])
def test_bound_of_the_exact_posterior_is_the_entropy(process, schedule):
    torch.manual_seed(0)
    model = exact_chain(process)
    if schedule:
        set_schedule(model, schedule)
    bound, se = mean_bound(model, chain_draw(64 * 300))
    assert se < 0.02
    assert abs(bound - CHAIN_NATS) < 4 * se


def test_bound_counts_both_ends_of_a_short_range_of_noise():
    torch.manual_seed(0)
    model = exact_chain("embed")
    model.edges.copy_(torch.linspace(-2, 2, model.BINS + 1) - math.log(model.D))
    bound, se = mean_bound(model, chain_draw(64 * 300))
    # here the prior's and the clean end's terms are worth .07 and .18 nats; z1's marginal is .02 from N(0, I)
    assert -4 * se < bound - CHAIN_NATS < 4 * se + 0.02 and se < 0.01


@pytest.mark.parametrize("process", PROCESSES)
def test_bound_of_a_wrong_posterior_is_above_the_entropy(process):
    torch.manual_seed(0)
    model = exact_chain(process)
    exact = model.denoise
    model.denoise = lambda xt, t, **more: 0.4 * exact(xt, t, **more)
    bound, se = mean_bound(model, chain_draw(64 * 100))
    assert bound > CHAIN_NATS + 4 * se


def has_the_chains_transitions(x):
    """Whether each share of pairs in x (n, T_CHAIN) is within five standard errors of the chain's."""
    pairs = torch.bincount((x[:, :-1] * V_CHAIN + x[:, 1:]).flatten(), minlength=V_CHAIN ** 2)
    share, expected = pairs.view(V_CHAIN, V_CHAIN) / pairs.sum(), START[:, None] * CHAIN
    se = (expected * (1 - expected) / pairs.sum()).sqrt()
    return bool(((share - expected).abs() < 5 * se).all())


def is_distributed(tokens, weights):
    """Whether tokens (n,) are drawn in proportion to weights (V_CHAIN,), within 4.5 standard errors each."""
    truth = weights / weights.sum()
    share = torch.bincount(tokens, minlength=V_CHAIN) / len(tokens)
    return bool(((share - truth).abs() < 4.5 * (truth * (1 - truth) / len(tokens)).sqrt() + 1e-9).all())


@pytest.mark.parametrize("process", PROCESSES)
def test_samples_of_the_exact_posterior_have_the_chains_transitions(process):
    torch.manual_seed(0)
    n = 3000
    known = torch.zeros(n, T_CHAIN, dtype=torch.bool)
    *_, (x, _) = exact_chain(process).sample(known.long(), known, {"masked": T_CHAIN, "embed": 100}[process])
    assert has_the_chains_transitions(x)


@pytest.mark.parametrize("process", PROCESSES)
def test_infill_of_the_exact_posterior_follows_the_true_conditional(process):
    torch.manual_seed(0)
    n = 4000
    x = torch.full((n, 3), 2)
    x[:, 2] = 5                                                                 # 2 ? 5
    known = torch.tensor([True, False, True]).expand(n, -1)
    *_, (y, _) = exact_chain(process).sample(x, known, {"masked": 3, "embed": 100}[process])
    assert (y[:, ::2] == x[:, ::2]).all()
    assert is_distributed(y[:, 1], CHAIN[2] * CHAIN[:, 5])


@pytest.mark.parametrize("process, settings", [
    ("masked", {"noise": 0.6}), ("embed", {"noise": 0.4}), ("masked", {"remask": 0.1}),
    ("embed", {"eta": 0.0})])
def test_rewriting_and_remasking_leave_the_chain_as_it_is(process, settings):
    torch.manual_seed(0)
    n = 3000
    x, known = chain_draw(n), torch.zeros(n, T_CHAIN, dtype=torch.bool)
    *_, (y, _) = exact_chain(process).sample(x, known, {"masked": 150, "embed": 100}[process], **settings)
    kept = float((y == x).float().mean())
    chance = float((START ** 2).sum())
    # unmasked tokens stay, and masked ones are like them by more than chance; nothing is known at noise 1
    if "noise" not in settings:
        assert abs(kept - chance) < 0.02
    else:
        assert chance + 0.1 < kept < 0.95
    assert has_the_chains_transitions(y)


def test_guidance_raises_the_conditional_over_the_marginal_to_its_power():
    torch.manual_seed(0)
    n = 4000
    x = torch.full((n, 3), 2)                                                   # 2 ? 2
    known = torch.tensor([True, False, True]).expand(n, -1)
    for w in 0.5, 2.0:
        *_, (y, _) = exact_chain("masked").sample(x, known, 3, guidance=w)
        assert is_distributed(y[:, 1], (CHAIN[2] * CHAIN[:, 2]) ** (1 + w) / START ** w)


def test_guidance_of_embed_makes_what_fits_the_known_tokens_likelier():
    torch.manual_seed(0)
    n = 2000
    x = torch.full((n, 3), 2)
    known = torch.tensor([True, False, True]).expand(n, -1)
    truth = CHAIN[2] * CHAIN[:, 2] / START                                      # what the neighbours tell
    means = []
    for w in 0.0, 1.0, 3.0:
        *_, (y, _) = exact_chain("embed").sample(x, known, 50, guidance=w)
        means.append(float(truth.log()[y[:, 1]].mean()))
    assert means[0] + 0.1 < means[1] < means[2] - 0.02, means


def test_threshold_reveals_at_once_what_is_certain():
    model = build("masked", 3)
    logits = torch.zeros(2, 6, 3)
    logits[0, :4, 2] = 9
    model.denoise = lambda xt, t, **_: logits
    known = torch.zeros(2, 6, dtype=torch.bool)
    for order in "random", "confidence":
        states = [(x == 3).sum(1).tolist()
                  for x, _ in model.sample(known.long(), known, 6, order=order, threshold=0.9)]
        assert states[0] == [6, 6] and states[1][0] <= 2 and states[1][1] == 5 and states[-1] == [0, 0]
    # with nothing uncertain, one call
    model.denoise = lambda xt, t, **_: 9 * F.one_hot(torch.zeros_like(xt), 3).float()
    assert len(list(model.sample(known.long(), known, 6, threshold=0.9))) == 2


# ------------------------------------------------------------------------------------------------------------
# masked: exact counts and identities

def test_uniform_logits_cost_exactly_log_V():
    model = build("masked", 65)
    model.denoise = lambda xt, t, **_: torch.zeros(*xt.shape, 65)
    bound = model.nelbo(torch.randint(65, (8, 32)), torch.rand(8))
    assert torch.allclose(bound, torch.full((8,), math.log(65)), atol=1e-5)


def test_mean_over_all_masks_is_mean_chain_rule_over_all_orders():
    V, T = 3, 4
    model = build("masked", V, block_size=T)
    with torch.no_grad():
        model.stem.weight.mul_(3)
        for p in model.net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x0 = torch.tensor([[2, 0, 1, 1]])

    def nats(masked):
        xt = x0.masked_fill(masked, V)
        logits = model.denoise(xt, masked.sum(1) / T)
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
    for seed in range(20):
        t = times(np.random.default_rng(seed), 3, 16)
        k = model.count(t, T)
        assert (k[:, :8] + k[:, 8:] == T + 1).all() and k.min() >= 1 and k.max() <= T
        xt = model.corrupt(torch.zeros(16, T, dtype=torch.long), t[0])
        assert ((xt == 5).sum(1) == k[0]).all() and ((xt == 5) | (xt == 0)).all()
    assert model.count(torch.tensor([0.0, 1.0]), T).tolist() == [1, T]


def test_times_are_stratified_over_the_whole_step():
    t = times(np.random.default_rng(0), 4, 8)
    assert torch.equal(t[:, :4] + t[:, 4:], torch.ones(4, 4))
    # 16 pairs: no gap beyond two strata, and each micro-batch by itself
    assert (t.flatten().sort().values.diff() < 2 / 16).all()
    assert all((row.sort().values.diff() < 2 / 4 + 1e-3).all() for row in t)
    mean = torch.stack([times(np.random.default_rng(i), 2, 4) for i in range(4000)])
    assert abs(mean.mean() - 0.5) < 1e-3 and abs(mean.var() - 1 / 12) < 2e-3    # each time is uniform


def test_bound_of_one_batch_varies_less_with_stratified_times():
    model = build("masked", 11)
    logits = torch.zeros(32, 32, 11)
    logits[..., 0] = 5
    model.denoise = lambda xt, t, **_: logits * (1 - t)[:, None, None]          # the cost depends on t alone
    x0, stratified, independent = torch.zeros(32, 32, dtype=torch.long), [], []
    for i in range(100):
        stratified.append(model.nelbo(x0, times(np.random.default_rng(i), 1, 32)[0]).mean())
        independent.append(model.nelbo(x0, torch.rand(32)).mean())
    assert torch.stack(stratified).std() < 0.2 * torch.stack(independent).std()
    assert abs(torch.stack(stratified).mean() - torch.stack(independent).mean()) < 0.1


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
    xt, k = model.corrupt(x0, t), model.count(t, 32)
    nll = F.cross_entropy(model.denoise(xt, k / 32).transpose(1, 2), x0, reduction="none") * (xt == 11)
    full = nll.sum() / (8 * 33 / 2) if what == "loss" else (nll.sum(1) / k).mean()
    full.backward()
    assert abs((full - short).item()) < 1e-5
    assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(gradients, model.parameters()))


def test_compiled_training_is_eager_training_and_unpaired_times_give_no_number():
    x0, t = torch.randint(11, (8, 32)), times(np.random.default_rng(0), 1, 8)[0]
    model = build("masked", 11)
    masked = choose(torch.rand(8, 32), model.count(t, 32))
    model.corrupt = lambda x0, t: x0.masked_fill(masked, 11)                    # compiled, other noise comes
    eager = model(x0, t)
    model.compile()
    assert abs((model(x0, t) - eager).item()) < 1e-4
    model(x0, t).backward()
    assert model.state_dict().keys() == build("masked", 11).state_dict().keys()
    assert torch.isnan(model(x0, torch.full((8,), 0.9)))                        # no pairs: no wrong number


def test_hidden_tokens_tell_nothing_and_stay_out_of_the_schedule():
    model = build("embed", 11)
    x0, t = torch.randint(11, (8, 32)), times(np.random.default_rng(0), 1, 8)[0]
    torch.nn.init.zeros_(model.head.weight)                                     # the context tells nothing
    torch.nn.init.normal_(model.bias)
    model.HIDDEN_SHARE, model.KNOWN_SHARE = 1.0, 0.0
    alone = F.cross_entropy(model.bias.expand(x0.numel(), -1), x0.flatten())
    assert abs(model(x0, t).item() - alone.item()) < 1e-5 and not model.fresh.any()
    model.HIDDEN_SHARE = 0.0
    assert model(x0, t) < alone - 0.1 and abs(model.fresh[1].sum().item() - 8) < 1e-5


# ------------------------------------------------------------------------------------------------------------
# network

def test_network_sees_all_positions_both_ways_and_the_time():
    net = build("masked", 11).net
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x, t = torch.randn(1, 16, 32), torch.tensor([0.3])
    y = net(x, t)
    for i in (0, 15):
        moved = x.clone()
        moved[0, i] += torch.randn(32)
        assert ((net(moved, t) - y).abs().sum(-1) > 1e-4).all()
    assert (net(x, torch.tensor([0.6])) - y).abs().max() > 1e-3
    assert (net(x[:, [1, 0, *range(2, 16)]], t)[:, 2:] - y[:, 2:]).abs().max() > 1e-3   # positions matter


def test_dropout_drops_in_training_only():
    model = build("masked", 11, dropout=0.5)
    with torch.no_grad():
        for p in model.net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x, t = torch.randint(11, (2, 32)), torch.rand(2)
    assert torch.equal(model.denoise(x, t), model.denoise(x, t))
    model.train()
    assert not torch.equal(model.denoise(x, t), model.denoise(x, t))


# ------------------------------------------------------------------------------------------------------------
# sampler

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
            settings["order"] = str(rng.choice(["random", "confidence", "margin", "entropy"]))
            settings["threshold"] = float(rng.choice([1, 1, 0.3]))
            settings["remask"] = float(rng.choice([0, 0, 0.3, 0.9]))
        calls.clear()
        torch.manual_seed(7)
        states = list(model.sample(x, known, steps, **settings))
        unknown = (~known).sum(1)
        least = most = steps * int(unknown.any())
        if process == "masked":
            noised = int((unknown * settings["noise"]).round().clamp(min=1).minimum(unknown).max())
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
    known = torch.zeros(1, 30, dtype=torch.bool)
    for steps in 1, 2, 4, 7, 29, 30, 100:
        left = [int((x == 11).sum()) for x, _ in model.sample(known.long(), known, steps, schedule=schedule)]
        assert left[0] == 30 and left[-1] == 0 and len(left) == min(steps, 30) + 1
        assert all(a > b for a, b in itertools.pairwise(left))
        if steps < 8:
            grid = [30 * SCHEDULES[schedule](1 - i / steps) for i in range(steps + 1)]
            assert all(abs(a - b) <= 1.51 for a, b in zip(left, grid))
        if schedule == "linear":
            assert max(a - b for a, b in itertools.pairwise(left)) <= -(-30 // min(steps, 30)) + 1


def test_draws_follow_the_probabilities_and_never_take_a_zero():
    torch.manual_seed(0)
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    share = torch.bincount(draw(p.expand(100_000, -1)), minlength=6) / 100_000
    assert (share[p == 0] == 0).all() and ((share - p).abs() < 4.5 * (p * (1 - p) / 1e5).sqrt() + 1e-9).all()
    # a tail of 2^16 tokens that hold one half together, and one that holds next to nothing
    tail = torch.full((128, 2 ** 16), 2.0 ** -16)
    tail[:, 0] = 1
    assert 35 < (draw(tail) > 0).sum() < 93                                     # 128 draws, one half each
    tail[:, 1:] = 2.0 ** -40
    assert (draw(tail) > 0).sum() <= 1


def test_truncation_keeps_the_likeliest():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 3.0, 0.0]])

    assert torch.allclose(probabilities(logits, 1.0, 0, 1.0), logits.softmax(-1))
    assert ((probabilities(logits, 1.0, 2, 1.0) > 0).sum(-1) == 2).all()
    # .644 < .7 <= .881
    assert (probabilities(logits, 1.0, 0, 0.7)[0] > 0).tolist() == [True, True, False, False]
    assert (probabilities(logits, 1.0, 0, 1e-6) > 0).sum(-1).tolist() == [1, 1]
    assert probabilities(logits, 0, 0, 1.0)[0].tolist() == [1, 0, 0, 0]
    assert torch.allclose(probabilities(logits, 1e-20, 0, 1.0)[0], torch.tensor([1.0, 0, 0, 0]))
    assert torch.allclose(probabilities(logits, 2.0, 0, 1.0), (logits / 2).softmax(-1))
    assert torch.allclose(probabilities(logits, 1.0, 2, 0.9).sum(-1), torch.ones(2))


@pytest.mark.parametrize("V", [65, 2 ** 13])
def test_top_is_topk_in_rows_of_any_length(V):
    torch.manual_seed(0)
    x = torch.randn(5, 7, V)
    x[0, 0, [3, 70 % V, 71 % V]] = 9.0                  # ties, within a block and across
    for k in 1, 2:
        values, ids = top(x, k)
        assert torch.equal(values, x.topk(k).values) and torch.equal(x.gather(-1, ids), values)
        assert all(len(set(row)) == k for row in ids.flatten(0, 1).tolist())


def test_orders_rank_by_their_measure():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.45, 0.05, 0.5], [0.4, 0.3, 0.3]])
    assert torch.allclose(surety(p.log(), "confidence"), torch.tensor([0.5, 0.5, 0.4]))
    assert torch.allclose(surety(p.log(), "margin"), torch.tensor([0.0, 0.05, 0.1]), atol=1e-6)
    assert surety(p.log(), "entropy").argmax() == 0 and surety(p.log(), "entropy").argmin() == 2
    # the surest position is revealed first: position 3 alone is certain
    model = build("masked", 3)
    logits = torch.zeros(1, 6, 3)
    logits[0, 3, 2] = 9
    model.denoise = lambda xt, t, **_: logits
    known = torch.zeros(1, 6, dtype=torch.bool)
    for order in "confidence", "margin", "entropy":
        states = [x for x, _ in model.sample(known.long(), known, 6, order=order)]
        assert (states[1] != 3).nonzero().tolist() == [[0, 3]]


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
        assert stop.value.code == 0 and all(f"--{name}=" in text for name in vars(cls()))
    assert "where ckpt.pt" not in text and "0: always the likeliest" in text


def test_the_default_is_the_laptop_config():
    assert load(Config, [os.path.join(HERE, "config", "shakespeare_cpu.py")]) == Config()


@pytest.mark.parametrize("name", sorted(os.listdir(os.path.join(HERE, "config"))))
def test_config_files_load(name):
    if name.endswith(".py"):
        load(Config, [os.path.join(HERE, "config", name)])


@pytest.mark.parametrize("cls, argv, words", [
    (Config, ["--n_layr=3"], "'n_layr' 'n_layer'"),
    (Config, ["--n_layer=many"], "n_layer int 'many'"),
    (Config, ["--n_layer=2.5"], "n_layer int"),
    (Config, ["--n_layer={[]}"], "n_layer int"),
    (Config, ["--learning_rate=1e999"], "learning_rate inf finite"),
    (Config, ["--compile=yes"], "compile bool"),
    (Config, ["--n_layer"], "n_layer int"),
    (Config, ["nowhere.py"], "'nowhere.py'"),
    (Config, ["--n_embd=100", "--n_head=3"], "n_embd 100 n_head 3"),
    (Config, ["--batch_size=7"], "batch_size 7 even pairs"),
    (Config, ["--n_layer=0"], "n_layer 0 at least 1"),
    (Config, ["--dropout=1.0"], "dropout 1.0"),
    (Config, ["--eval_iters=1"], "eval_iters 1"),
    (Config, ["--max_iters=-1"], "max_iters -1"),
    (Config, ["--process=msked"], "process 'msked' masked, embed"),
    (Config, ["--dtype=float8"], "dtype 'float8' bfloat16"),
    (SampleConfig, ["--eta=1.5"], "eta 1.5 [0, 1]"),
    (SampleConfig, ["--steps=0"], "steps 0 from 1 to a million"),
    (SampleConfig, ["--length=-1"], "length -1 from 0 to a million"),
    (SampleConfig, ["--noise=0"], "noise 0.0 in (0, 1]"),
    (SampleConfig, ["--threshold=1.5"], "threshold 1.5 in (0, 1]"),
    (SampleConfig, ["--remask=1"], "remask 1.0 in [0, 1)"),
    (SampleConfig, ["--guidance=-1"], "guidance -1.0 0 or more"),
    (SampleConfig, ["--remask"], "remask float ''"),
    (SampleConfig, ["--temperature=-1"], "temperature -1"),
    (SampleConfig, ["--top_p=0"], "top_p 0.0 in (0, 1]"),
    (SampleConfig, ["--top_p=1.5"], "top_p 1.5 (0, 1]"),
    (SampleConfig, ["--top_k=-1"], "top_k -1"),
    (SampleConfig, ["--num_samples=0"], "num_samples 0"),
    (SampleConfig, ["--order=best"], "order 'best' one of random, confidence"),
    (SampleConfig, ["--schedule=sqrt"], "schedule 'sqrt' one of linear, cosine"),
])
def test_a_wrong_setting_is_named_in_one_sentence(cls, argv, words):
    with pytest.raises(SystemExit) as stop:
        load(cls, argv)
    assert all(word in stop.value.code for word in words.split()) and "\n" not in stop.value.code


def test_a_broken_config_file_is_named(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("n_layer = = 3")
    with pytest.raises(SystemExit, match="c.py can't be read"):
        load(Config, [str(file)])


# ------------------------------------------------------------------------------------------------------------
# the scripts, as a user runs them: in an empty folder, in this process unless it takes several

def script(name, *argv):
    """Runs a script as `python name argv`; returns its globals. SystemExit comes through."""
    before = sys.argv, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    sys.argv = [name, *argv]
    try:
        return runpy.run_path(os.path.join(HERE, name), run_name="__main__")
    finally:
        sys.argv = before[0]
        signal.signal(signal.SIGINT, before[1])
        signal.signal(signal.SIGTERM, before[2])


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


def weights(path):
    return load_checkpoint(str(path))["model"]


def test_prepare_writes_bins_that_decode_to_the_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = "Grüße, 世界!\r\n" * 50
    (tmp_path / "t.txt").write_bytes(text.encode())
    script("prepare_shakespeare.py", "--input", "t.txt", "--dataset", "mine")
    meta = json.loads((tmp_path / "data/mine/meta.json").read_text())
    tokens = np.concatenate([np.fromfile(f"data/mine/{split}.bin", np.uint16) for split in ("train", "val")])
    assert Tokenizer(meta).decode(tokens.tolist()) == text
    assert Tokenizer(meta).encode(text) == tokens.tolist()
    assert (meta["train_tokens"], meta["val_tokens"]) == (
        int(0.9 * len(text)), len(text) - int(0.9 * len(text)))
    assert meta["source"] == "t.txt" and meta["vocab_size"] == len(set(text)) == len(meta["chars"])
    assert "alphabet of 12" in capsys.readouterr().out


def test_without_a_network_the_source_is_named(tmp_path, monkeypatch, capsys):
    import urllib.request
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen",
                        lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    script("prepare_shakespeare.py")
    assert "can't be downloaded (no network)" in capsys.readouterr().out
    assert "Python" in json.loads((tmp_path / "data/shakespeare/meta.json").read_text())["source"]


def test_a_wrong_download_is_refused(tmp_path, monkeypatch):
    import io
    import urllib.request
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: io.BytesIO(b"<html>not found</html>"))
    with pytest.raises(SystemExit, match="sha256"):
        script("prepare_shakespeare.py")
    assert not os.path.exists("data")


@pytest.mark.parametrize("content, words", [
    (b"", "0 characters"), (b"\xff\xfe\x00", "not UTF-8"), (None, "can't be read"),
    (b"aaaaaaaaaaaa", "1 distinct"),
    ("".join(map(chr, range(0x10000, 0x10000 + 65_600))).encode(), "65,600 distinct")])
def test_prepare_refuses_bad_text_and_writes_nothing(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(SystemExit, match=words):
        script("prepare_shakespeare.py", "--input", "t.txt")
    assert not os.path.exists("data")
    (tmp_path / "data").write_text("a file")
    (tmp_path / "good.txt").write_text("some text to learn")
    for name in "prepare_shakespeare.py", "prepare_openwebtext.py":
        with pytest.raises(SystemExit, match=r"data/my can't be (written|made)"):
            script(name, "--input", "good.txt", "--dataset", "my")


# ------------------------------------------------------------------------------------------------------------
# many documents to BPE tokens: in this process, with small pieces of work, a large validation part, no pauses

DOCUMENTS = [re.sub("\n\n\n+", "\n\n", topics[name][:1500]).strip() for name in sorted(topics)[:40]] + [
    "ω<|endoftext|>ω"]


@pytest.fixture
def owt(tmp_path, monkeypatch):
    """prepare_openwebtext as a module; docs.tar, an archive of five .xz archives of DOCUMENTS."""
    if not (os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")):
        try:
            Tokenizer({"vocab_size": 50257})
        except SystemExit:
            pytest.skip("GPT-2's byte pairs aren't here: set TIKTOKEN_CACHE_DIR or connect once")
    import prepare_openwebtext
    monkeypatch.chdir(tmp_path)
    for name, value in {"UNIT": 3000, "VAL_SHARE": 0.3, "KEEP_SECONDS": 0}.items():
        monkeypatch.setattr(prepare_openwebtext, name, value)
    with tarfile.open("docs.tar", "w") as outer:
        for i in range(5):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w:xz") as tar:
                for j, text in enumerate(DOCUMENTS[i::5]):
                    add(tar, f"{j}.txt", text.encode())
            add(outer, f"openwebtext/{i}_data.xz", inner.getvalue())
    return prepare_openwebtext


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


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


def test_documents_of_every_kind_become_the_same_tokens(owt):
    plain = "\n<|endoftext|>\n".join(DOCUMENTS).encode()
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in DOCUMENTS).encode()
    os.makedirs("folder/deep")
    for name, content in {"a.txt": plain, "b.txt.xz": lzma.compress(plain), "c.txt.gz": gzip.compress(plain),
                          "d.jsonl": lines, "e.jsonl.gz": gzip.compress(lines), "folder/README": b"no",
                          "folder/deep/f.jsonl.xz": lzma.compress(lines)}.items():
        with open(name, "wb") as f:
            f.write(content)
    with tarfile.open("plain.tar.gz", "w:gz") as tar:
        for i, text in enumerate(DOCUMENTS):
            add(tar, f"{i}.txt", text.encode())
    for path in ("a.txt", "b.txt.xz", "c.txt.gz", "d.jsonl", "e.jsonl.gz", "folder", "plain.tar.gz",
                 "docs.tar"):
        owt.prepare("x", [path])
        found = bins("x")
        if path != "docs.tar":
            assert [text for text in DOCUMENTS if text in found["train"]] == found["train"]
        # whatever the order, the same documents are for validation
        assert sorted(found["train"] + found["val"]) == sorted(DOCUMENTS) and len(found["val"]) > 3
        assert set(found["val"]) == {
            text for text in DOCUMENTS
            if int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) < 0.3 * 2 ** 64}
    owt.prepare("x", ["docs.tar"], ["a.txt"])
    assert sorted(bins("x")["train"]) == sorted(DOCUMENTS) and bins("x")["val"] == DOCUMENTS


@pytest.mark.parametrize("path", ["docs.tar", "docs.jsonl"])
def test_killed_at_any_time_it_ends_with_the_same_bytes(owt, path):
    with open("docs.jsonl", "w") as f:
        f.writelines(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    owt.prepare("whole", [path, path])
    code = (f"import prepare_openwebtext as p\np.UNIT, p.VAL_SHARE, p.KEEP_SECONDS = 3000, 0.3, 0\n"
            "tokenise, p.tokenise = p.tokenise, lambda *a: (p.time.sleep(0.05), tokenise(*a))[1]\n"
            f"p.prepare('cut', ['{path}', '{path}'])")
    journal, seen, kills = "data/cut/progress.json", None, 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": HERE},
                                   stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and kills < 3:         # killed whenever it has done more than before
            if os.path.exists(journal):
                with open(journal) as f:
                    before, seen = seen, f.read()
                if seen != before and before is not None:
                    process.kill()
                    kills += 1
        process.wait()
    assert kills == 3 and not os.path.exists(journal)
    for name in "train.bin", "val.bin", "meta.json":
        with open(f"data/cut/{name}", "rb") as a, open(f"data/whole/{name}", "rb") as b:
            assert a.read() == b.read()


def test_stopped_between_renames_it_is_finished_by_the_next_run(owt, monkeypatch):
    owt.prepare("whole", ["docs.tar"])
    replace = os.replace

    def stop(source, target):
        if target.endswith("val.bin"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        owt.prepare("cut", ["docs.tar"])
    assert not os.path.exists("data/cut/meta.json") and os.path.exists("data/cut/train.bin")
    monkeypatch.setattr(os, "replace", replace)
    owt.prepare("cut", ["docs.tar"])
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

    owt.prepare("x", ["docs.tar"] * 21)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(owt, "URL", address + "/{:02d}.tar")
        monkeypatch.setattr(time, "sleep", lambda _: None)
        owt.prepare("y")
        assert {at for path, at in requests if path == "/20.tar"} >= {0, 9000, 18000}
        monkeypatch.setattr(owt, "URL", address + "/{:02d}.tar".replace("{", "2{"))
        with pytest.raises(SystemExit, match="can't be read .download failed: HTTP Error 404"):
            owt.prepare("z")
        server.shutdown()
    assert bins("y") == bins("x")


def test_documents_that_cannot_be_read_are_named(owt, monkeypatch):
    with open("docs.tar", "rb") as f:
        archive = f.read()
    second = archive.index(b"openwebtext/1_data.xz")
    plain = lzma.compress(b"a b c " * 9000)
    for name, content, words in [
            ("boundary.tar", archive[:second], "cut short"),
            ("header.tar", archive[:second + 100], "cut short"),
            ("middle.tar", archive[:second + 1000], "unexpected end of data"),
            ("damaged.tar", archive[:second] + b"x" * 512 + archive[second + 512:], "cut short or damaged"),
            ("inner.tar", archive.replace(b"\xfd7zXZ", b"\xfd7zXY"), "can't be read"),
            ("cut.txt.xz", plain[:-20], "can't be read"), ("not.jsonl.gz", plain, "can't be read"),
            ("latin.txt", b"caf\xe9", "can't decode byte"),
            ("bad.jsonl", b'{"text": "a"}\n{"txt": 1}\n', "bad.jsonl, line 2: not a JSON object"),
            ("number.jsonl", b'{"text": 7}\n', "line 1: not a JSON object"),
            ("empty.txt", b"", "no text for train.bin in 0 documents"),
            ("one.txt", b"one text", "no text for (train|val).bin in 1 documents"),
            ("some.doc", b"x", "neither a file .txt")]:
        with open(name, "wb") as f:
            f.write(content)
        with pytest.raises(SystemExit, match=words):
            owt.prepare("x", [name])
        assert not os.path.exists("data/x/meta.json")
        if words.startswith("no text"):
            assert not os.listdir("data/x")
        shutil.rmtree("data/x", ignore_errors=True)
    os.mkdir("void")
    for path in "void", "nowhere.txt":
        with pytest.raises(SystemExit, match=f"{path} is neither"):
            owt.prepare("x", [path])
    # an interrupted run, and then other inputs
    monkeypatch.setattr(owt, "tokenise", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit, match="interrupted; the same command"):
        owt.prepare("x", ["docs.tar"])
    with open("data/x/progress.json", "w") as f:
        json.dump({"sources": []}, f)
    with pytest.raises(SystemExit, match="unfinished run with other inputs"):
        owt.prepare("x", ["docs.tar"])


def test_a_full_disk_is_one_sentence_and_can_be_taken_up(owt):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
    code = ("import prepare_openwebtext as p\np.UNIT, p.VAL_SHARE, p.KEEP_SECONDS = 3000, 0.3, 0\n"
            "p.prepare('x', ['docs.tar'])")
    settings = {"env": os.environ | {"PYTHONPATH": HERE}, "capture_output": True, "text": True}
    full = subprocess.run([sys.executable, "-c", limit + code], check=False, **settings)
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert "data/x can't be written (File too large): make room" in full.stderr
    assert not os.path.exists("data/x/train.bin")
    subprocess.run([sys.executable, "-c", code], check=True, **settings)
    owt.prepare("y", ["docs.tar"])
    assert bins("x") == bins("y")


@pytest.mark.parametrize("process", PROCESSES)
def test_byte_pairs_train_and_padding_is_never_sampled(owt, process, capsys):
    owt.prepare("openwebtext", ["docs.tar"])
    ran = script("train.py", *SMALL, "--dataset=openwebtext", f"--process={process}", "--eval_iters=2",
                 "--max_iters=2", "--batch_size=2", "--block_size=16", "--n_layer=1")
    model, out = ran["ema"], capsys.readouterr().out
    assert model.V == 50304 and "perplexity <= " in out and "source: docs.tar" in out
    known = torch.zeros(16, 16, dtype=torch.bool)
    for temperature in 1.0, 1e6:                            # nearly uniform over the ids that are left
        *_, (x, _) = model.sample(known.long(), known, 4, temperature=temperature)
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


def test_crops_and_times_of_a_step_are_drawn_apart(here, capsys):
    ran = script("train.py", *SMALL, "--max_iters=1", "--out_dir=apart")
    starts, offsets = [], []
    for step in range(200):
        rng = np.random.default_rng((0, 1, step, 0))
        starts.append(rng.integers(0, 10 ** 6, 8))
        offsets.append(times(np.random.default_rng((1, 1, step)), 1, 8)[0, :1].numpy() % 0.25)
    together = np.corrcoef(np.concatenate([np.array(starts), np.array(offsets)], 1).T)[-1, :-1]
    assert abs(together).max() < 0.3
    assert not torch.equal(ran["batch"]("train", 1, 0, 0), ran["batch"]("train", 1, 0, 1))
    assert torch.equal(ran["batch"]("train", 1, 0, 1), ran["batch"]("train", 1, 0, 1))


def test_crops_cover_the_whole_split():
    x = crops(np.arange(40, dtype=np.uint16), np.random.default_rng(0), 500, 8)
    assert x.dtype == torch.int64 and x.min() == 0 and x.max() == 39 and (x.diff() == 1).all()


def test_training_prints_and_logs_what_it_promises(here, capsys):
    script("train.py", *SMALL, "--out_dir=printed", "--seed=2")
    out = capsys.readouterr().out
    assert "source: the Python reference" in out and "float32" in out and "parameters" in out
    found = re.findall(r"^step (\d+): val nelbo (\d\.\d{4}) ± (\d\.\d{4}) nats/token, \d\.\d+ bits/char",
                       out, re.MULTILINE)
    assert [step for step, _, _ in found] == ["4", "8"]
    assert re.findall(r"^  (0\.\d+) +\d", out, re.MULTILINE) == [
        "0.05", *(f"0.{i}0" for i in range(1, 10)), "0.95"] * 2
    rows = (here / "printed/log.csv").read_text().splitlines()
    assert (rows[0].startswith("step,train_loss,val_nelbo")
            and [row.split(",")[0] for row in rows[1:]] == ["4", "8"])
    assert rows[1].split(",")[2] == found[0][1]
    ran = script("train.py", *SMALL, "--init_from=printed/model.pt", "--eval_only=True")
    assert not any(p.requires_grad for p in ran["ema"].parameters())
    best = min(found, key=lambda row: float(row[1]))
    assert f"step {best[0]}: val nelbo {best[1]}" in capsys.readouterr().out    # same crops and noise again


@pytest.mark.parametrize("process", PROCESSES)
def test_stop_and_resume_is_bit_identical(here, process, capsys):
    flags = [*SMALL, f"--process={process}", "--gradient_accumulation_steps=2", "--dropout=0.1"]
    script("train.py", *flags, "--out_dir=whole")
    # a signal in step 5: the step is finished and saved, the exit is clean
    fold = torch._foreach_lerp_
    steps = []

    def lerp(*args):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return fold(*args)

    torch._foreach_lerp_ = lerp
    try:
        script("train.py", *flags, "--out_dir=parts")
    finally:
        torch._foreach_lerp_ = fold
    assert len(steps) == 5 and "stopped at step 5" in capsys.readouterr().out
    script("train.py", *flags, "--out_dir=parts", "--init_from=resume")
    whole, parts = load_checkpoint("whole/ckpt.pt"), load_checkpoint("parts/ckpt.pt")
    for name in "model", "ema":
        assert all(torch.equal(whole[name][key], parts[name][key]) for key in whole[name])
    assert parts["step"] == 8 and whole["best"] == parts["best"]
    logs = [(here / folder / "log.csv").read_text() for folder in ("whole", "parts")]
    assert ([row.split(",")[:4:2] for row in logs[0].split()]
            == [row.split(",")[:4:2] for row in logs[1].split()])


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
        _, err = run.communicate(timeout=200)
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
    script("train.py", *flags, "--out_dir=one")
    finish(torchrun(2, *flags, "--out_dir=two"))
    finish(torchrun(3, *flags, "--out_dir=three"))
    finish(*(torchrun(2, *flags, "--out_dir=nodes", node=node, nodes=2) for node in (0, 1)))
    # checkpoints from 4 processes resume on 1, and the other way round; warm-up alone decides these steps
    finish(torchrun(4, *flags, "--out_dir=down", "--max_iters=4"))
    script("train.py", *flags, "--out_dir=down", "--init_from=resume")
    script("train.py", *flags, "--out_dir=up", "--max_iters=4")
    finish(torchrun(4, *flags, "--out_dir=up", "--init_from=resume"))
    for name in "two", "three", "nodes", "down", "up":
        assert differ("one", name) < 1e-5, name
        assert abs(load_checkpoint("one/ckpt.pt")["best"] - load_checkpoint(f"{name}/ckpt.pt")["best"]) < 1e-4
    run = torchrun(5, *flags)
    assert "multiple of the 5 processes" in run.communicate()[1] and run.returncode != 0


def test_a_killed_process_ends_the_job_which_resumes(here):
    flags = [*SMALL, "--gradient_accumulation_steps=2", "--max_iters=100000", "--out_dir=killed"]
    run = torchrun(2, *flags)
    while not os.path.exists("killed/ckpt.pt"):
        assert run.poll() is None
        time.sleep(0.1)
    workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode != 0 and "Signal 9 (SIGKILL)" in err
    assert "lost another process of this run; when the cause is mended, --init_from=resume goes on" in err
    assert "[rank0]:   File" not in err                     # no traceback of ours
    step = load_checkpoint("killed/ckpt.pt")["step"]
    finish(torchrun(2, *flags, "--init_from=resume", f"--max_iters={step + 3}"))
    assert load_checkpoint("killed/ckpt.pt")["step"] == step + 3


def test_a_stopped_torchrun_saves(here, capsys):
    run = torchrun(2, *SMALL, "--gradient_accumulation_steps=2", "--max_iters=100000",
                   "--eval_interval=100000", "--out_dir=stopped")
    while "stopped" not in os.listdir():
        assert run.poll() is None
        time.sleep(0.2)
    time.sleep(2)
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=60)
    step = int(re.search(r"stopped at step (\d+)", out).group(1))
    assert load_checkpoint("stopped/ckpt.pt")["step"] == step > 0
    script("sample.py", "--out_dir=stopped", "--num_samples=1")             # though there was no evaluation
    assert f"step {step}, bound not measured" in capsys.readouterr().err


def test_weights_can_start_a_run_on_other_text_of_the_same_alphabet(here, capsys):
    shutil.copytree("data/text", "data/new")
    shutil.copy("data/text/val.bin", "data/new/train.bin")
    script("train.py", *SMALL, "--init_from=out/model.pt", "--dataset=new", "--out_dir=fine", "--max_iters=1",
           "--learning_rate=0.0", "--adam_lr=0.0", "--eval_interval=1")
    assert all(torch.equal(a, weights("out/model.pt")[k]) for k, a in weights("fine/ckpt.pt").items())


def test_training_refuses_what_it_cannot_use(here, tmp_path):
    text = here / "data" / "text"
    alphabet = json.loads((text / "meta.json").read_text())

    def dataset(name, train=None, val=None, **changes):
        folder = here / "data" / name
        folder.mkdir(exist_ok=True)
        (folder / "meta.json").write_text(json.dumps(alphabet | changes))
        (folder / "train.bin").write_bytes(
            (text / "train.bin").read_bytes()[:20_000] if train is None else train)
        (folder / "val.bin").write_bytes((text / "val.bin").read_bytes()[:2_000] if val is None else val)

    dataset("odd", train=b"123")
    dataset("short", val=b"\0\0" * 31)
    dataset("beyond", train=np.full(100, 999, np.uint16).tobytes())
    dataset("other", chars=alphabet["chars"][::-1])
    (here / "trunc").mkdir(exist_ok=True)
    (here / "trunc/ckpt.pt").write_bytes((here / "out/ckpt.pt").read_bytes()[:5000])
    torch.save({"model": 1}, here / "trunc/foreign.pt")
    torch.save(load_checkpoint("out/model.pt") | {"model": {}}, here / "trunc/older.pt")
    dataset("cut")
    (here / "data" / "cut" / "meta.json").write_text('{"tokenizer": "cha')
    torch.save({"f": os.system}, here / "trunc/code.pt")
    before = (here / "out/ckpt.pt").read_bytes()
    for words, *flags in [
        ("no data/none/meta.json: run python prepare_shakespeare.py", "--dataset=none"),
        ("odd number of bytes", "--dataset=odd"),
        ("fewer than block_size 32", "--dataset=short"),
        ("the id 999, beyond the vocabulary", "--dataset=beyond"),
        ("another vocabulary", "--dataset=other", "--init_from=out/model.pt"),
        ("no checkpoint nowhere/ckpt.pt", "--init_from=resume", "--out_dir=nowhere"),
        ("trunc/ckpt.pt can't be read", "--init_from=resume", "--out_dir=trunc"),
        ("not a checkpoint of this project", "--init_from=trunc/foreign.pt"),
        ("can't be read as a checkpoint", "--init_from=trunc/code.pt"),
        ("has n_layer 2, not 3", "--n_layer=3", "--init_from=out/model.pt"),
        ("device is 'tpu'", "--device=tpu"),
        ("device is 'cuda:99'", "--device=cuda:99"),
        ("data/cut/meta.json isn't what", "--dataset=cut"),
        ("weights in trunc/older.pt don't fit", "--init_from=trunc/older.pt"),
        ("no optimizer state", "--init_from=resume", "--out_dir=bare"),
        ("init_from is out/model.pt, which this run would overwrite", "--init_from=out/model.pt"),
        ("trunc/ckpt.pt can't be written to: ", "--out_dir=trunc/ckpt.pt"),
        ("loss is nan at step", "--learning_rate=1e18", "--grad_clip=0.0"),
    ]:
        if "--out_dir=bare" in flags:
            (here / "bare").mkdir(exist_ok=True)
            (here / "bare/ckpt.pt").write_bytes((here / "out/model.pt").read_bytes())
        with pytest.raises(SystemExit) as stop:
            script("train.py", *SMALL, *flags)
        assert words in stop.value.code and "\n" not in stop.value.code
    assert (here / "out/ckpt.pt").read_bytes() == before


# ------------------------------------------------------------------------------------------------------------
# sample.py

def test_sampling_fills_blanks_and_repeats_itself(here, capsys):
    flags = ["--text=The{19} of {5}.", "--num_samples=3", "--steps=6"]
    script("sample.py", *flags)
    first = capsys.readouterr()
    parts = first.out[:-1].split("\n" + "-" * 80 + "\n")
    assert len(parts) == 3 and all(re.fullmatch(r"The.{19} of .{5}\.", part, re.DOTALL) for part in parts)
    assert "72 tokens in 6 network calls" in first.err and "masked diffusion" in first.err
    script("sample.py", *flags)
    assert capsys.readouterr().out == first.out
    script("sample.py", *flags, "--seed=2")
    assert capsys.readouterr().out != first.out
    script("sample.py", "--text=The", "--num_samples=1", "--steps=300")
    again = capsys.readouterr()
    assert again.out.startswith("The") and len(again.out) == 33 and "29 network calls" in again.err
    script("sample.py", "--num_samples=1", "--steps=2", "--temperature=0", "--order=entropy", "--watch")
    assert "\033" not in capsys.readouterr().err                                # not a terminal


@pytest.mark.parametrize("words, flags", [
    ("no checkpoint nowhere/model.pt", ["--out_dir=nowhere"]),
    (b"'\\u4e16' isn't in the tokenizer's alphabet".decode("unicode_escape"), ["--text=世{3}"]),
    ("text has 1000000000000 tokens", ["--text={1000000000000}"]),
    ("text has 40 tokens", ["--text=" + 40 * "a"]),
    ("text has 40 tokens", ["--edit=" + 40 * "a"]),
    ("text has 60 tokens, of which at most 50", ["--text=" + 40 * "a" + "{20}", "--length=50"]),
    ("none of them unknown", ["--text=a{0}"]),
    ("none of them unknown", ["--text=abc", "--length=3"]),
    ("give one of them", ["--text=a{3}", "--edit=abc"]),
    ("give one of them", ["--text=a{3}", "--prompt_file=nowhere.txt"]),
    ("'nowhere.txt' can't be read as UTF-8 text: No such file", ["--prompt_file=nowhere.txt"]),
    ("'out/model.pt' can't be read as UTF-8 text: ", ["--prompt_file=out/model.pt"]),
    ("guidance follows what is known", ["--guidance=1"]),
    ("guidance follows what is known", ["--guidance=1", "--edit=abc"]),
    ("noise is for edit", ["--noise=0.2"]),
    ("length is 30, but edit keeps the text's 3 tokens", ["--edit=abc", "--length=30"]),
    ("'empty.txt' is empty", ["--prompt_file=empty.txt"]),
    ("'empty.txt' is empty", ["--edit=empty.txt"]),
    ("eta is 0.5, but masked diffusion has no such setting", ["--eta=0.5"]),
    ("svg 'no/where.svg' can't be written: No such file", ["--svg=no/where.svg"]),
])
def test_sampling_refuses_what_it_cannot_use(here, words, flags):
    (here / "empty.txt").write_text("")
    with pytest.raises(SystemExit) as stop:
        script("sample.py", *flags)
    assert words in stop.value.code and "\n" not in stop.value.code


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


def test_watch_draws_every_state_in_a_terminal(here, monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    script("sample.py", "--text=The{8}", "--num_samples=1", "--steps=4", "--watch")
    frames = capsys.readouterr().err.split("\033[H\033[2J")[1:]
    assert len(frames) == 5 and frames[0].count("\033[2m·") == 8 and frames[-1].count("\033[2m") == 0
    assert (sum(frame.count("\033[32m") for frame in frames) == 8
            and all(f.startswith("\033[0mT") for f in frames))


def samples(capsys, *flags):
    script("sample.py", *flags)
    out = capsys.readouterr()
    return out.out[:-1].split("\n" + "-" * 80 + "\n"), out.err


def test_long_texts_are_written_in_windows(here, capsys):
    (text,), err = samples(capsys, "--length=100", "--num_samples=1", "--steps=8")
    assert len(text) == 100 and "100 tokens in 44 network calls" in err          # the last window lacks 4
    with open("prompt.txt", "w") as f:
        f.write("The{60} of\n")
    texts, err = samples(capsys, "--prompt_file=prompt.txt", "--length=80", "--num_samples=3", "--steps=4")
    assert all(text.startswith("The") and text[63:66] == " of" and len(text) == 80 for text in texts)
    texts, _ = samples(capsys, "--text=" + 40 * "a", "--length=50", "--steps=4")
    assert all(text.startswith(40 * "a") and len(text) == 50 for text in texts)


def test_a_text_is_rewritten_the_more_the_noise(here, capsys):
    text = "The value of the expression is"
    kept = []
    for noise in 0.01, 0.4, 1.0:
        texts, _ = samples(capsys, f"--edit={text}", f"--noise={noise}", "--num_samples=8")
        assert all(len(new) == len(text) for new in texts)
        kept.append(sum(a == b for new in texts for a, b in zip(new, text)) / (8 * len(text)))
    assert kept[0] > 0.75 > kept[1] > 0.4 > kept[2]
    with open("edit.txt", "w") as f:
        f.write(3 * text + "\n")
    (new, *_), _ = samples(capsys, "--edit=edit.txt", "--noise=0.01", "--length=90", "--num_samples=2")
    assert len(new) == 90 and sum(a == b for a, b in zip(new, 3 * text)) > 80


def test_noise_of_sampling_is_not_the_embeddings_of_training(here, monkeypatch):
    script("train.py", *SMALL, "--process=embed", "--max_iters=1", "--seed=7", "--out_dir=seed7")
    states, sample = [], PROCESSES["embed"].sample

    def kept(*args, **settings):
        for state in sample(*args, **settings):
            states.append(state[0])
            yield state

    monkeypatch.setattr(PROCESSES["embed"], "sample", kept)
    script("sample.py", "--out_dir=seed7", "--seed=7", "--steps=1", "--num_samples=1")
    # the same random numbers would make position i look like token i
    assert (states[0][0] == torch.arange(32)).float().mean() < 0.2


def test_an_interrupted_run_prints_what_it_has(here, capsys, monkeypatch):
    generators = []

    def interrupted(self, *args, **settings):
        generators.append(sample(self, *args, **settings))
        for i, state in enumerate(generators[-1]):
            if i == 3:
                raise KeyboardInterrupt
            yield state

    sample = PROCESSES["masked"].sample
    monkeypatch.setattr(PROCESSES["masked"], "sample", interrupted)
    texts, err = samples(capsys, "--text=The{20}", "--steps=20", "--num_samples=2")
    assert len(texts) == 2 and len(generators) == 1 and "interrupted" in err
    assert all(text.startswith("The") and text.count("·") == 18 for text in texts)


def test_samples_come_in_batches_that_fit(here, capsys, monkeypatch):
    sizes, sample = [], PROCESSES["masked"].sample

    def counted(self, x, *args, **settings):
        sizes.append(len(x))
        return sample(self, x, *args, **settings)

    monkeypatch.setattr(PROCESSES["masked"], "sample", counted)
    texts, _ = samples(capsys, "--num_samples=10000", "--steps=1")
    assert len(texts) == 10_000 == sum(sizes) and len(set(texts)) > 9_900
    assert max(sizes) < 10_000 and len(set(sizes[:-1])) == 1


def test_svg_holds_every_frame_and_ends_with_the_text(here, capsys):
    namespace = "{http://www.w3.org/2000/svg}"
    for steps in 4, 128:
        (text, _), _ = samples(capsys, "--text=a < b{200} & c", "--length=209", f"--steps={steps}",
                               "--num_samples=2", "--svg=a.svg")
        assert os.path.getsize("a.svg") < 100_000
        groups = ElementTree.parse("a.svg").getroot().findall(f"{namespace}g/{namespace}g")
        assert len(groups) == 50 and len(groups[-1]) == 1 and groups[-1][0].get("class") == "settled"
        lines = {}
        for span in groups[-1].iter(f"{namespace}tspan"):
            old = lines.get(int(span.get("y")), "")
            lines[int(span.get("y"))] = "".join(
                a if b == " " else b for a, b in itertools.zip_longest(old, span.text, fillvalue=" "))
        drawn = "".join(lines[y].rstrip() for y in sorted(lines)).replace(" ", "")
        assert drawn == re.sub(r"\s", "", text)


@pytest.mark.parametrize("text, lines", [
    (64 * "a" + "\nb", {24: 64 * "a", 44: "b"}), (65 * "a", {24: 64 * "a", 44: "a"}),
    ("a\n\nb", {24: "a", 64: "b"}),
    ("世世<", {24: "世世<"}), ("a\x07\tb", {24: "a  b"})])
def test_svg_lays_text_out_in_lines_and_columns(text, lines):
    root = ElementTree.fromstring(animation([[(c, "settled") for c in text]]))
    assert {int(span.get("y")): span.text for span in root.iter("{http://www.w3.org/2000/svg}tspan")} == lines


@pytest.mark.parametrize("settings", [{"temperature": 1e-50}, {"top_p": 1e-50}])
def test_settings_beyond_float32_mean_greedy(settings):
    logits = torch.randn(3, 9)
    p = probabilities(logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings)
    assert (p.argmax(-1) == logits.argmax(-1)).all() and ((p > 0).sum(-1) == 1).all()


def test_embed_survives_steps_closer_than_float32():
    model = build("embed", 11)
    x = torch.randint(11, (2, 32))
    for noise, schedule in (1e-6, "linear"), (1e-4, "cosine"):
        *_, (y, certainty) = model.sample(x, torch.zeros_like(x).bool(), 64, noise=noise, schedule=schedule)
        assert (y == x).float().mean() > 0.95 and certainty.isfinite().all()


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
                          "--n_layer=2", "--n_embd=64", "--n_head=1", "--max_iters=400",
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
    names = re.search(r"^     t +(.*)$", out, re.MULTILINE).group(1).split("  ")
    names = ["t", *(name.strip() for name in names if name.strip())]
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
    known = torch.zeros(64, 64, dtype=torch.bool)
    *_, (x, _) = model.sample(known.long(), known, 64)
    tokens = np.fromfile("data/prose/train.bin", np.uint16)
    share, real = (np.bincount(ids, minlength=model.V) / len(ids) for ids in (x.flatten().numpy(), tokens))
    assert share.max() < 1.5 * real[share.argmax()]
    assert (-(share[share > 0] * np.log(share[share > 0])).sum()
            > -(real[real > 0] * np.log(real[real > 0])).sum() - 0.3)
