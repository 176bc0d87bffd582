"""Tokens on disk: data/<dataset>/ holds train.bin and val.bin (uint16 each) and meta.json (the tokenizer).

Bins are memory-mapped, so a corpus may be far larger than memory.
"""
import codecs
import json
import os
import pickle

import numpy as np
import torch

from config import Config, fail
from diffusion import PROCESSES


class Tokenizer:
    """Text to token ids and back, as meta.json says: an alphabet of characters, or GPT-2's byte pairs."""

    def __init__(self, meta):
        self.V = meta["vocab_size"]
        self.chars = meta.get("chars")
        if self.chars is None:
            import tiktoken
            self.V = -(-self.V // 64) * 64              # as matrix products like it; the rest means nothing
            try:
                self.bpe = tiktoken.get_encoding("gpt2")
            except OSError as e:                        # requests' errors are OSErrors
                fail(f"GPT-2's byte pairs (1.5 MB) can't be downloaded ({type(e).__name__}): connect once, "
                     "or set TIKTOKEN_CACHE_DIR to a folder that has them")
        else:
            self.ids = {c: i for i, c in enumerate(self.chars)}

    def encode(self, text):
        """List of ids; exits on a character that the alphabet lacks."""
        if self.chars is None:
            return self.bpe.encode_ordinary(text)
        for c in text:
            if c not in self.ids:
                fail(f"the character {c!r} isn't in the tokenizer's alphabet of {self.V}: leave it out")
        return [self.ids[c] for c in text]

    def pieces(self, ids):
        """Each token's text, · for an id that is none ([MASK]); half a character goes to the other half."""
        if self.chars:
            return [self.chars[i] if i < len(self.chars) else "·" for i in ids]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts = [decoder.decode(self.bpe.decode_single_token_bytes(i)) if i < self.bpe.n_vocab
                 else decoder.decode(b"", True) + "·" for i in ids]
        return [*texts[:-1], "".join(texts[-1:]) + decoder.decode(b"", True)]

    def decode(self, ids):
        return "".join(self.pieces(ids))


def load_meta(dataset):
    """meta.json of data/<dataset> as a dict; exits if the dataset isn't there."""
    path = os.path.join("data", dataset, "meta.json")
    script = "prepare_openwebtext.py" if dataset.startswith("openwebtext") else "prepare_shakespeare.py"
    if not os.path.exists(path):
        fail(f"there is no {path}: run python {script} --dataset {dataset} first")
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
        return meta | {"vocab_size": int(meta["vocab_size"]), "source": str(meta["source"])}
    except (ValueError, LookupError, TypeError):
        fail(f"{path} isn't what {script} writes: run it again")


def load_weights(model, weights, path):
    """Loads a checkpoint's weights into model; exits if they are not this model's."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError):
        fail(f"the weights in {path} don't fit this model: was it written by another version?")


def load_bin(dataset, split, V, block_size, look=True):
    """The split as a memory-mapped uint16 array of at least a block; look: reads it all for ids beyond V."""
    path = os.path.join("data", dataset, f"{split}.bin")
    if not os.path.exists(path):
        fail(f"there is no {path}: run the prepare script for {dataset!r} again")
    size = os.path.getsize(path)
    if size % 2:
        fail(f"{path} has an odd number of bytes ({size}), so it isn't whole uint16 tokens: prepare it again")
    if size < 2 * block_size:
        fail(f"{path} has {size // 2} tokens, fewer than block_size {block_size}: lower it or add text")
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    if look and tokens.max() >= V:
        fail(f"{path} holds the id {tokens.max()}, beyond the vocabulary of {V}: prepare it again")
    return tokens


def crops(tokens, rng, B, T):
    """(B, T) int64: B random stretches of T tokens."""
    starts = rng.integers(0, len(tokens) - T + 1, B)
    return torch.from_numpy(np.stack([tokens[i:i + T] for i in starts]).astype(np.int64))


def replace_file(path, content):
    """Writes bytes under a temporary name, then renames: there is the old file or the new one, never half."""
    with open(path + ".tmp", "wb") as f:
        f.write(content)
    os.replace(path + ".tmp", path)


def write_dataset(dataset, train, val, meta):
    """Writes uint16 arrays and meta.json into data/<dataset>."""
    folder = os.path.join("data", dataset)
    meta = meta | {"train_tokens": len(train), "val_tokens": len(val)}
    contents = {"train.bin": train.tobytes(), "val.bin": val.tobytes(),
                "meta.json": json.dumps(meta, indent=1).encode()}
    try:
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(os.path.join(folder, "meta.json")):   # without it, nobody takes the rest for whole
            os.remove(os.path.join(folder, "meta.json"))
        for name, content in contents.items():
            replace_file(os.path.join(folder, name), content)
    except OSError as e:
        fail(f"{folder} can't be written ({e.strerror}): the dataset is not complete")


def save_checkpoint(path, content):
    """Writes a plain dict as a checkpoint; a crash on the way leaves the old file as it was."""
    try:
        torch.save(content, path + ".tmp")
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:                # torch raises RuntimeErrors for a full disk
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        fail(f"{path} can't be written ({e}); what was there before is as it was")


def load_checkpoint(path):
    """What save_checkpoint() wrote, on the CPU. Never executes code; exits if it is missing or foreign."""
    if not os.path.exists(path):
        fail(f"there is no checkpoint {path}: train first, or name another file or folder")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # truncated, not a checkpoint, or one that asks to run code
    except (RuntimeError, ValueError, LookupError, OSError, EOFError, pickle.UnpicklingError) as e:
        fail(f"{path} can't be read as a checkpoint of this project ({type(e).__name__}): is it truncated?")
    kinds = {"config": dict, "meta": dict, "model": dict, "step": int}
    if not isinstance(content, dict) or not all(isinstance(content.get(k), kinds[k]) for k in kinds):
        fail(f"{path} is not a checkpoint of this project: config, meta, model or step isn't what this "
             "version writes")
    return content


def load_model(path, **changes):
    """(model, tokenizer, its Config, a line about it) of a model.pt, ready to sample; exits if it isn't one.

    changes are made to the Config it was trained with: the device (by default the CPU), dtype.
    """
    ckpt = load_checkpoint(path)
    try:
        cfg = Config(**ckpt["config"] | {"device": "cpu"} | changes)
        tokenizer = Tokenizer(ckpt["meta"])
        bound = f"{ckpt['nelbo']:.4f} nats/token" if "nelbo" in ckpt else "not measured"
        about = f"step {ckpt['step']}, bound {bound}, trained on {ckpt['meta']['source']}"
    except (TypeError, ValueError, LookupError) as e:
        fail(f"{path} isn't a model of this version ({type(e).__name__}: {e})")
    model = PROCESSES[cfg.process](cfg, tokenizer.V)
    load_weights(model, ckpt["model"], path)
    return model.to(cfg.device).eval(), tokenizer, cfg, about
