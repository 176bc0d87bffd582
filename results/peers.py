"""What published packages of the field say and write when an exact model takes the place of their network.

    python -m venv env && . env/bin/activate
    pip install torch==2.13.0 numpy==2.4.6
    pip install flow-matching==1.0.10                       # what PACKAGES says beside the package's name
    python results/peers.py flow-matching                   # prints its rows of the table in peers.md

The data are 10 tokens of a Markov chain over 7, whose exact posterior is known. Two questions:

- What does the loss say of a model that knows nothing? Uniform logits must cost log 7 = 1.946 nats a token. And
  of the exact model? The entropy, 1.158: less is no bound, more is a loose one.
- What does the sampler write with the exact model? Its pairs of neighbours are compared with the chain's by total
  variation, after 2, 4, 10 and 32 steps, and [MASK]s that are left at the end are counted.

A model here is a function of tokens (B, T) in which 7 is [MASK]; it returns logits (B, T, 7). For processes without
[MASK] the share of tokens that noise has left alone comes second.
"""
import importlib.metadata
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

V = MASK = 7
T = 10
STEPS = 2, 4, 10, 32
N_LOSS, N_SAMPLES, BATCHES = 1000, 4000, 40

# ---- the chain, and what models know of it


def seeded(seed, *shape):
    """A tensor of normal random numbers that is the same everywhere."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


MOVES = (2 * seeded(3, V, V)).softmax(1)                    # p(next token | this one)
FIRST = seeded(4, V).softmax(0)


def marginals():
    """(T, V): how likely each token is at each place."""
    rows = [FIRST]
    for _ in range(T - 1):
        rows.append(rows[-1] @ MOVES)
    return torch.stack(rows)


PAIRS = marginals()[:-1].mean(0)[:, None] * MOVES           # of neighbours, over all places
ENTROPY = float(torch.special.entr(FIRST).sum() - (T - 1) * (PAIRS * MOVES.log()).sum()) / T


def text(n):
    """(n, T) tokens of the chain."""
    x = [torch.multinomial(FIRST, n, replacement=True)]
    for _ in range(T - 1):
        x.append(torch.multinomial(MOVES[x[-1]], 1)[:, 0])
    return torch.stack(x, 1)


def posterior(evidence):
    """log p(token | all evidence) at each place, by forward-backward; evidence (B, T, V) are likelihoods."""
    forward = torch.ones_like(evidence)
    backward = torch.ones_like(evidence)
    before = FIRST.expand(len(evidence), V)
    for i in range(T):
        forward[:, i] = F.normalize(before * evidence[:, i], p=1, dim=1, eps=0)
        before = forward[:, i] @ MOVES
    for i in range(T - 1, 0, -1):
        ahead = (backward[:, i] * evidence[:, i]) @ MOVES.T
        backward[:, i - 1] = F.normalize(ahead, p=1, dim=1, eps=0)
    both = F.normalize(forward * backward, p=1, dim=2, eps=0)
    return both.log().clamp(min=-60).float()


def exact(x, kept=None):
    """The model that knows the chain."""
    if kept is not None:
        share = torch.as_tensor(kept).double().reshape(-1, 1, 1)
        return posterior(share * F.one_hot(x, V) + (1 - share) / V)
    seen = torch.cat((torch.eye(V), torch.ones(1, V))).double()
    return posterior(seen[x])


def uniform(x, kept=None):
    """The model that knows nothing but how the noise works."""
    if kept is not None:
        share = torch.as_tensor(kept).reshape(-1, 1, 1)
        return (share * F.one_hot(x, V) + (1 - share) / V).log()
    return torch.zeros(*x.shape, V)


def copying(model):
    """The model, but a revealed place is sure of its own token."""
    def copies(x):
        own = 60.0 * F.one_hot(x.clamp(max=V - 1), V)
        return torch.where((x == MASK)[..., None], model(x), own)
    return copies


def with_mask(logits):
    """Logits with a column for [MASK], which is never the answer."""
    return torch.cat((logits, torch.full_like(logits[..., :1], -1e9)), -1)


def masks(n):
    """(n, T) where all is [MASK]."""
    return torch.full((n, T), MASK)


# ---- the measurements


def mean_loss(loss, model):
    """The mean of loss(model, x0), which may be a scalar or have values for each row, and its standard error."""
    torch.manual_seed(0)
    means = torch.stack([loss(model, text(N_LOSS)).detach().mean() for _ in range(BATCHES)])
    return f"{means.mean():.3f} ± {means.std() / BATCHES ** .5:.3f}"


def distance(x):
    """Total variation between the pairs of neighbours in x (n, T) and the chain's."""
    pairs = x[:, :-1] * V + x[:, 1:]
    share = torch.bincount(pairs.flatten(), minlength=V * V) / pairs.numel()
    return 0.5 * float((share - PAIRS.flatten()).abs().sum())


def row(what, loss=None, sample=None, models=(uniform, exact), steps=STEPS, n=N_SAMPLES):
    """Prints a row: loss(model, x0) of the two models, samples of sample(n, steps) with the exact one."""
    losses = [mean_loss(loss, model) if loss else "" for model in models]
    distances, left = [], 0
    for k in steps if sample else ():
        torch.manual_seed(1)
        x = sample(n, k)
        left = max(left, float((x == MASK).float().mean()))
        whole = x[(x < V).all(1)]
        distances.append(f"{distance(whole):.3f}".lstrip("0") if len(whole) else "-")
    print("|", " | ".join([what, *losses, " / ".join(distances), f"{left:.0%}" if sample else ""]), "|", flush=True)


# ---- ours, and the scale


def scale():
    """True draws, and tokens that follow each place's distribution without looking at each other."""
    row("true draws", sample=lambda n, steps: text(n))
    alone = marginals()
    row("independent tokens", sample=lambda n, steps: torch.multinomial(alone, n, True).T)


def ours():
    """This repository's two processes."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import numpy as np

    from config import Config
    from diffusion import PROCESSES, times

    def build(process, denoise):
        cfg = Config(process=process, block_size=T, n_layer=1, n_head=1, n_embd=16, device="cpu")
        model = PROCESSES[process](cfg, V)
        model.denoise = denoise(model)
        return model

    def masked(answer):
        return lambda model: lambda xt, where: answer(xt)[where]

    def embed(answer):
        """The evidence of noisy vectors, in the place of tokens."""
        def of(model):
            def denoise(xt, t, sc=None, known=None):
                alpha, sigma = model.scales(t)
                alike = (alpha / sigma ** 2).reshape(-1, 1, 1) * (xt @ model.table().T)
                return answer(alike.double().softmax(-1))
            return denoise
        return of

    rng = np.random.default_rng(0)

    def measure(what, process, models, **settings):
        def loss(model, x0):
            return build(process, model).nelbo(x0, times(rng, 1, len(x0))[0])

        def sample(n, steps):
            blank = torch.zeros(n, T, dtype=torch.long)
            *_, (x, _) = build(process, models[1]).sample(blank, blank.bool(), steps, **settings)
            return x

        row(what, loss, sample, models)

    both = masked(uniform), masked(exact)
    measure("masked", "masked", both)
    for order in "confidence", "margin", "entropy":
        measure(f"masked, order {order}", "masked", both, order=order)
    measure("embed", "embed", (embed(lambda e: e.log().float()), embed(posterior)))


# ---- the packages


def flow_matching():
    """Meta's discrete flows: a path that mixes source and data, generalised KL, Euler solver."""
    from flow_matching.loss import MixturePathGeneralizedKL
    from flow_matching.path import MixtureDiscreteProbPath
    from flow_matching.path.scheduler import PolynomialConvexScheduler
    from flow_matching.solver import MixtureDiscreteEulerSolver
    from flow_matching.utils import ModelWrapper

    path = MixtureDiscreteProbPath(PolynomialConvexScheduler(n=1.0))
    kl = MixturePathGeneralizedKL(path, reduction="none")

    class Model(ModelWrapper):
        def forward(self, x, t):
            return self.model(x, t).softmax(-1)

    def answer(model, noise, x, t):
        return with_mask(model(x)) if noise == "mask" else model(x, t)

    def measure(what, noise, *models):
        def source(n):
            return masks(n) if noise == "mask" else torch.randint(V, (n, T))

        def loss(model, x0):
            t = torch.rand(len(x0))
            xt = path.sample(source(len(x0)), x0, t).x_t
            return kl(answer(model, noise, xt, t), x0, xt, t).mean(1)

        def sample(n, steps):
            model = Model(lambda x, t: answer(models[1], noise, x, t))
            solver = MixtureDiscreteEulerSolver(model, path, V + (noise == "mask"))
            return solver.sample(source(n), step_size=1 / steps)

        row(what, loss, sample, models)

    def hesitant(x):
        return exact(x).where((x == MASK)[..., None], 0)    # at revealed places, which no loss trains, anything

    measure("mask source", "mask", uniform, exact)
    measure("mask source, revealed places copied", "mask", copying(uniform), exact)
    measure("mask source, a model unsure of what it sees", "mask", uniform, hesitant)
    measure("the same, revealed places copied", "mask", uniform, copying(hesitant))
    measure("uniform source", "uniform", uniform, exact)


def bionemo_moco():
    """NVIDIA's MDLM with both schedules, and its sampler that goes by confidence."""
    from bionemo.moco.distributions.prior.discrete.mask import DiscreteMaskedPrior
    from bionemo.moco.distributions.time.uniform import UniformTimeDistribution
    from bionemo.moco.interpolants.continuous_time.discrete.mdlm import MDLM
    from bionemo.moco.schedules.inference_time_schedules import LinearInferenceSchedule
    from bionemo.moco.schedules.noise import continuous_noise_transforms as noise

    def measure(what, schedule, **settings):
        mdlm = MDLM(UniformTimeDistribution(), DiscreteMaskedPrior(V + 1), schedule)

        def loss(model, x0):
            t = mdlm.sample_time(len(x0))
            xt = mdlm.interpolate(x0, t)
            return mdlm.loss(with_mask(model(xt)), x0, xt, t)

        def sample(n, steps):
            time = LinearInferenceSchedule(nsteps=steps, direction="diffusion")
            x = mdlm.sample_prior((n, T))
            for t, dt in zip(time.generate_schedule(), time.discretize()):
                x = mdlm.step(with_mask(exact(x)), t.expand(n), x, dt, **settings)
            return x

        row(what, loss, sample)

    measure("MDLM, log-linear", noise.LogLinearExpNoiseTransform())
    measure("MDLM, log-linear, temperature .5", noise.LogLinearExpNoiseTransform(), temperature=0.5)
    measure("MDLM, cosine", noise.CosineExpNoiseTransform())
    mdlm = MDLM(UniformTimeDistribution(), DiscreteMaskedPrior(V + 1), noise.LogLinearExpNoiseTransform())

    def confident(n, steps):
        x = masks(n)
        for i in range(steps):
            x = mdlm.step_confidence(with_mask(exact(x)), x, i, steps)
        return x

    row("MDLM.step_confidence", sample=confident, steps=(T,))


def diffusers():
    """The schedulers for tokens; they have no losses."""
    import diffusers as lib

    def amused(temperature):
        def sample(n, steps):
            scheduler = lib.AmusedScheduler(mask_token_id=MASK, masking_schedule="linear")
            scheduler.set_timesteps(steps, temperature=temperature)
            x = masks(n)
            for t in scheduler.timesteps:
                x = scheduler.step(with_mask(exact(x)), int(t), x).prev_sample
            return x
        return sample

    def blocks(temperature):
        def sample(n, steps):
            scheduler = lib.BlockRefinementScheduler(block_length=T)
            scheduler.set_timesteps(steps, block_length=T)
            x = masks(n)
            for i in range(min(steps, T)):
                logits = with_mask(exact(x))
                x = scheduler.step(logits, i, x, mask_token_id=MASK, temperature=temperature).prev_sample
            return x
        return sample

    def ddim(sweeps, temperature=1.0, **settings):
        def sample(n, steps):
            scheduler = lib.DiscreteDDIMScheduler(num_inference_steps=steps, **settings)
            scheduler.set_timesteps(steps)
            x = torch.randint(V, (n, T))
            for i in range(steps):
                x = scheduler.step(exact(x, i / steps), i, x, temperature=temperature).prev_sample
                for _ in range(sweeps * (i + 1 < steps)):
                    x = scheduler.step_correct(exact(x, (i + 1) / steps), i, x).prev_sample
            return x
        return sample

    def vq(n, steps):
        scheduler = lib.VQDiffusionScheduler(V + 1, num_train_timesteps=steps)
        scheduler.set_timesteps(steps)
        x = masks(n)
        for t in scheduler.timesteps:
            x = scheduler.step(exact(x).transpose(1, 2), t, x).prev_sample
        return x

    row("AmusedScheduler, default temperature (2, 0)", sample=amused((2, 0)))
    row("AmusedScheduler, temperature (0, 0)", sample=amused((0, 0)))
    row("BlockRefinementScheduler, temperature 1", sample=blocks(1.0))
    row("BlockRefinementScheduler, default temperature 0", sample=blocks(0.0))
    row("DiscreteDDIMScheduler, temperature 1", sample=ddim(0))
    row("DiscreteDDIMScheduler, default temperature 0", sample=ddim(0, 0.0))
    row("DiscreteDDIMScheduler, 4 sweeps of its corrector a step", sample=ddim(4))
    row("the same, corrector_selection random", sample=ddim(4, corrector_selection="random"))
    row("VQDiffusionScheduler, as many steps as trained", sample=vq)


def transformers():
    """The entropy-bound sampler of DiffusionGemma; the model is told which tokens of the canvas were accepted."""
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as gemma

    def write(result, t_max, t_min):
        def sample(n, steps):
            bound = gemma.EntropyBoundSamplerConfig(entropy_bound=0.1)      # generate's default, as .8 and .4 are
            sampler = gemma.EntropyBoundSampler(bound, T, V, steps)
            x, known = sampler.initialize_canvas(n, "cpu"), torch.zeros(n, T, dtype=torch.bool)
            for left in range(steps, 0, -1):
                temperature = t_min + (t_max - t_min) * left / steps
                logits = exact(x.where(known, MASK)) / temperature
                drawn = torch.multinomial(logits.softmax(-1).view(-1, V), 1).view(n, T)
                accepted = sampler.accept_canvas(x, drawn, logits, left)
                x, known = sampler.renoise_canvas(accepted, left), sampler.accepted_token_mask
            return logits.argmax(-1) if result == "argmax" else x
        return sample

    row("EntropyBoundSampler, its canvas, temperature 1", sample=write("canvas", 1, 1))
    row("EntropyBoundSampler, the argmax that generate returns, temperature 1", sample=write("argmax", 1, 1))
    row("EntropyBoundSampler, as generate does it, temperature .8 to .4", sample=write("argmax", 0.8, 0.4))


def x_transformers():
    """Its wrapper for masked models; the network itself is replaced."""
    from x_transformers import Encoder, NonAutoregressiveWrapper, TransformerWrapper

    def wrapper(model, **settings):
        net = TransformerWrapper(num_tokens=V + 1, max_seq_len=T, attn_layers=Encoder(dim=8, depth=1, heads=1))

        def forward(x, return_logits_and_embeddings=False, **_):
            logits = with_mask(model(x))
            return (logits, None) if return_logits_and_embeddings else logits

        net.forward = forward
        exactly = {"no_replace_prob": 0.0, "random_token_prob": 0.0}
        return NonAutoregressiveWrapper(net, mask_id=MASK, **exactly, **settings)

    def loss(**settings):
        return lambda model, x0: wrapper(model, **settings)(x0).loss

    def sample(**settings):
        return lambda n, steps: wrapper(exact, steps=steps).generate(n, **settings)

    row("NonAutoregressiveWrapper", loss(), sample())
    row("the same without its loss weight, and without its filter",
        loss(use_simple_mdlm_loss_weight=False), sample(filter_thres=None))


def d3_dna():
    """SEDD with its absorbing graph, by the score of the exact model: log p - log(e^sigma - 1) at a [MASK]."""
    from d3_dna.models import diffusion as d3

    graph = d3.Absorbing(V)

    def measure(what, predictor, *sigmas):
        noise = d3.GeometricNoise(*sigmas)

        def score(model, x, sigma):
            log_p = model(x).log_softmax(-1) - sigma.expm1().log().reshape(-1, 1, 1)
            return torch.cat((log_p, torch.zeros(*x.shape, 1)), -1)

        def loss(model, x0):
            t = 1e-5 + (1 - 1e-5) * torch.rand(len(x0), 1)
            sigma, rate = noise(t)
            xt = graph.sample_transition(x0, sigma)
            return (rate * graph.score_entropy(score(model, xt, sigma), sigma, xt, x0)).mean(1)

        def sample(n, steps):
            sampler = d3.get_pc_sampler(graph, noise, (n, T), predictor, steps, dtype=torch.float32)

            class Net(torch.nn.Module):
                def forward(self, x, labels, train, sigma):
                    return score(exact, x, sigma)
            return sampler(Net(), None)

        row(what, loss, sample)

    measure("SEDD, default sigma .001 to 1, analytic", "analytic")
    measure("SEDD, sigma .0001 to 20, analytic", "analytic", 1e-4, 20)
    measure("SEDD, sigma .0001 to 20, Euler", "euler", 1e-4, 20)


def dllm_reason():
    """MDLM and its random order."""
    from dllm_reason.models.base import DiffusionOutput
    from dllm_reason.models.mdlm import MDLM
    from dllm_reason.scheduler.random_scheduler import RandomScheduler

    def build(model):
        mdlm = MDLM(V, T, dim=8, num_layers=1, num_heads=1, noise_schedule="linear")
        mdlm.forward = lambda x, t, attention_mask=None: DiffusionOutput(with_mask(model(x)), None, None)
        return mdlm

    row("MDLM, linear", lambda model, x0: build(model).compute_loss(x0),
        lambda n, steps: build(exact).sample(RandomScheduler(), n, T, num_steps=steps))


def telos_ml():
    """MDLM's loss and its sampler, which goes by a margin with noise and takes one text at a time."""
    from telos.diffusion.mdlm import apply_masking_pytorch, mdlm_loss_pytorch
    from telos.diffusion.sampler import MDLMSampler

    ordinary = torch.zeros(V + 1, dtype=torch.bool)         # no token is special
    model = torch.nn.Module()
    model.forward = lambda x: with_mask(exact(x))

    def loss(model, x0):
        t = torch.rand(len(x0), 1).clamp(min=1e-5)
        xt, hidden, t = apply_masking_pytorch(x0, t, MASK, ordinary)
        return mdlm_loss_pytorch(with_mask(model(xt)), x0, hidden, t)[0]

    def sample(n, steps):
        sampler = MDLMSampler(model, MASK, steps, repetition_penalty=1.0, schedule="linear")
        return torch.cat([sampler.sample(T) for _ in range(n)])

    row("MDLM, linear, no repetition penalty", loss, sample, n=1500)


def omgformers():
    """MaskScheduler for training, ParallelDecoder for sampling."""
    from types import SimpleNamespace

    from omgformers.diffusion import MaskScheduler, ParallelDecoder

    def measure(schedule):
        def scheduler(steps):
            return MaskScheduler(steps, schedule, MASK, -1, V + 1, random_token_prob=0.0)

        def loss(model, x0):
            t = torch.randint(1, T + 1, (len(x0),))
            xt, hidden = scheduler(T).corrupt_batch(x0, t, T)
            return scheduler(T).compute_loss(with_mask(model(xt)), x0, hidden)

        def sample(n, steps):
            net = torch.nn.Linear(1, 1)
            net.forward = lambda x, timesteps: SimpleNamespace(logits=with_mask(exact(x)))
            prompt = torch.empty(n, 0, dtype=torch.long)
            return ParallelDecoder(net, scheduler(steps)).generate(prompt, T, steps)

        row(f"masked, plain mean, {schedule}", loss, sample)

    measure("cosine")
    measure("linear")


def evodiff():
    """OADM: masks, reweighted loss, and its sampler, which reveals one place a step. 31 symbols, of which we use 7."""
    import numpy as np
    from evodiff.collaters import OAMaskCollater
    from evodiff.generate import generate_oaardm
    from evodiff.losses import OAMaskedCrossEntropyLoss
    from evodiff.utils import Tokenizer

    np.random.seed(0)                                       # which the collater draws from
    tokenizer = Tokenizer()
    collate, nll = OAMaskCollater(tokenizer), OAMaskedCrossEntropyLoss(reweight=True, tokenizer=tokenizer)

    def widened(model, x, mask):
        logits = torch.full((*x.shape, 31), -60.0)
        logits[..., :V] = model(x.where(x != mask, MASK))
        return logits

    def loss(model, x0):
        strings = [("".join(tokenizer.alphabet[i] for i in line),) for line in x0.tolist()]
        xt, k, x, hidden = collate(strings)
        logits = widened(model, xt, tokenizer.mask_id)
        return nll(logits, x, hidden, k, torch.ones_like(x))[0] / x.numel()

    def sample(n, steps):
        def model(x, t):
            return widened(exact, x, tokenizer.mask_id)
        return generate_oaardm(model, tokenizer, T, batch_size=n, device="cpu")[0]

    row("OADM", loss, sample, steps=(T,))


def dantinox():
    """LLaDA's loss on JAX, with times from the trainer's lowest, .05, and the stream sampler."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from dantinox.core import generation
    from dantinox.core.diffusion import corrupt, make_noise_schedule, masked_cross_entropy

    def tensor(x):
        return torch.from_numpy(np.array(x)).long()

    def logits_of(model, x):
        return jnp.asarray(with_mask(model(tensor(x))).numpy())

    generation._forward_logits = lambda model, x, cache: logits_of(model, x)

    def measure(schedule, lowest):
        def loss(model, x0):
            key = jax.random.key(int(torch.randint(2 ** 31, ())))
            x, t = jnp.asarray(x0.numpy()), jnp.asarray((lowest + (1 - lowest) * torch.rand(len(x0))).numpy())
            xt = corrupt(x, t, key, schedule, MASK)
            return torch.tensor(float(masked_cross_entropy(logits_of(model, xt), x, xt, MASK, t)))

        def sample(n, steps):
            levels = make_noise_schedule(schedule, steps)
            *_, (_, _, x) = generation.stream_diffusion_generate(
                exact, None, T, levels, MASK, num_sampling_steps=steps, batch_size=n)
            return tensor(x)

        row(f"{schedule}, times from {lowest:g}", loss, sample)

    measure("linear", 1e-6)
    measure("linear", 0.05)
    measure("cosine", 0.05)
    measure("sqrt", 0.05)


def llada():
    """Not a package: the sampler of LLaDA's paper (arXiv:2502.09992) in our own words."""
    def write(temperature):
        def sample(n, steps):
            x = masks(n)
            for left in range(steps - 1, -1, -1):
                logits = exact(x)
                drawn = logits.argmax(-1)
                if temperature:
                    sharp = (logits / temperature).softmax(-1)
                    drawn = torch.multinomial(sharp.view(-1, V), 1).view(n, T)
                sure = logits.softmax(-1).gather(2, drawn[..., None])[..., 0]
                sure = sure.where(x == MASK, 2.0)
                x = drawn.where(x == MASK, x)
                again = sure.argsort(1)[:, :T * left // steps]              # the least sure are masked again
                x = x.scatter(1, again, MASK)
            return x
        return sample

    row("low-confidence remasking, temperature 1", sample=write(1.0))
    row("low-confidence remasking, temperature 0, as in the paper", sample=write(0.0))


PACKAGES = {        # function, and what pip installs
    "scale": (scale, ""),
    "ours": (ours, ""),
    "llada": (llada, ""),
    "flow-matching": (flow_matching, "flow-matching==1.0.10"),
    "bionemo-moco": (bionemo_moco, "bionemo-moco==0.0.2.2"),
    "diffusers": (diffusers, "diffusers==0.42.1 huggingface-hub==2.4.0"),
    "transformers": (transformers, "transformers==5.24.0"),
    "x-transformers": (x_transformers, "x-transformers==2.31.10"),
    "d3-dna": (d3_dna, "d3-dna==0.1.3"),
    "dllm-reason": (dllm_reason, "--no-deps dllm-reason==1.6.1 einops==0.8.2 tqdm==4.70.1"),
    "telos-ml": (telos_ml, "telos-ml==1.2.0"),
    "omgformers": (omgformers, "--no-deps omgformers==2.0.6 tqdm==4.70.1"),
    "evodiff": (evodiff, "evodiff==1.1.2 'setuptools<81'"),
    "dantinox": (dantinox, "dantinox==0.4.14 flax==0.12.4"),
}


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    if name not in PACKAGES:
        sys.exit("one of: " + "".join(f"\n  {name:16} pip install {pins}" for name, (_, pins) in PACKAGES.items()))
    torch.set_num_threads(1)
    measure_package, pins = PACKAGES[name]
    version = importlib.metadata.version(name) if pins else ""
    print(f"{name} {version} torch {torch.__version__}; entropy {ENTROPY:.4f}, log V {math.log(V):.4f}")
    measure_package()
