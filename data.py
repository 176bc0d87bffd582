"""Tokens and checkpoints on disk: data/<dataset>/ holds train.bin and val.bin (uint16) and meta.json."""
import codecs
import gzip
import json
import lzma
import os
import pickle
import re
from pathlib import Path

import numpy as np
import torch

from config import Config, fail


class Tokenizer:
    """Text to token ids and back, as meta.json says: characters and longer strings, or GPT-2's byte pairs."""

    def __init__(self, meta):
        self.V, self.chars = meta["vocab_size"], meta.get("chars")
        if self.chars is None:
            import tiktoken
            self.V = -(-self.V // 64) * 64              # as matrix products like it; the rest means nothing
            try:
                self.bpe = tiktoken.get_encoding("gpt2")
            except OSError as e:                        # requests' errors are OSErrors
                fail(f"GPT-2's byte pairs: {type(e).__name__}; connect once, or set TIKTOKEN_CACHE_DIR")

    def encode(self, text):
        """List of ids; exits on a character that the alphabet lacks."""
        if self.chars is None:
            return self.bpe.encode_ordinary(text)
        ids = {string: i for i, string in enumerate(self.chars)}                # each character, maybe more
        if lacking := set(text) - set(ids):
            fail(f"the character {min(lacking)!r} isn't in the tokenizer's alphabet: leave it out")
        longest_first = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
        return [ids[string] for string in re.findall(longest_first, text)]

    def pieces(self, ids):
        """Each token's text, · for an id that is none ([MASK]); half a character goes to the other half."""
        if self.chars:
            return [self.chars[i] if i < len(self.chars) else "·" for i in ids]
        raw = [self.bpe.decode_single_token_bytes(i) if i < self.bpe.n_vocab else "·".encode() for i in ids]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")      # keeps a half until the rest comes
        return [decoder.decode(piece, final=n == len(raw)) for n, piece in enumerate(raw, 1)]

    def decode(self, ids):
        return "".join(self.pieces(ids))

def load_data(dataset, block_size):
    """(meta.json, {split: tokens, mapped}) of data/<dataset>; exits if it isn't whole."""
    folder, splits = Path("data", dataset), {}
    try:
        if (path := folder / "progress.json").exists():                         # the journal of a preparation
            fail(f"{folder} is unfinished: {json.loads(path.read_text('utf-8'))['command']} finishes it")
        meta = json.loads((path := folder / "meta.json").read_text("utf-8"))
        V, _ = meta["vocab_size"], meta["source"]
        for split in "train", "val":
            path, n = folder / f"{split}.bin", meta[f"{split}_tokens"]
            if (size := path.stat().st_size) != 2 * n:
                fail(f"{path} has {size} bytes, not two for each of the {n} tokens: copy or prepare it anew")
            if n < block_size:
                fail(f"{path} has {n} tokens, fewer than block_size {block_size}: lower it or add text")
            splits[split] = ids = np.memmap(path, np.uint16, "r")              # may be far larger than memory
            if (top := max(ids[:10 ** 7].max(), ids[-10 ** 7:].max())) >= V:    # so a look at the ends
                fail(f"{path} holds the id {top}, beyond the vocabulary of {V}: prepare it again")
        return meta, splits
    except (OSError, ValueError, LookupError, TypeError) as e:
        fail(f"{path} can't be used ({type(e).__name__}): prepare_*.py --dataset {dataset} writes it")

def crops(tokens, rng, B, T):
    """(B, T) int64: B random stretches of T tokens."""
    starts = rng.integers(0, len(tokens) - T + 1, B)
    return torch.from_numpy(np.stack([tokens[i:i + T] for i in starts]).astype(np.int64))

def unpacked(path, stream=None):
    """A file to read bytes from, or in its place a stream, unpacked where path ends in .xz or .gz."""
    unpack = {".xz": lzma.open, ".gz": gzip.open}.get(os.path.splitext(path)[1].lower())
    return unpack(stream or path) if unpack else stream or open(path, "rb")

def replace_file(path, write):
    """write(file) fills a temporary file, which then takes the name: there is the old one or the new."""
    with open(f"{path}.tmp", "wb") as file:
        write(file)
    os.replace(f"{path}.tmp", path)

def save_checkpoint(path, content):
    """Writes a plain dict as a checkpoint; a crash on the way leaves the old file as it was."""
    try:
        replace_file(path, lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as e:                # torch raises RuntimeErrors for a full disk
        fail(f"{path} can't be written ({e}); what was there before is as it was")

def load_checkpoint(path):
    """What save_checkpoint() wrote, on the CPU. Never executes code; exits if it is missing or foreign."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        Config(**ckpt["config"]), ckpt["model"], ckpt["meta"]["source"], ckpt["step"] + ckpt.get("nelbo", 0)
        return ckpt
    except (RuntimeError, ValueError, LookupError, TypeError, OSError, EOFError, pickle.UnpicklingError) as e:
        fail(f"{path} isn't a checkpoint of this version ({type(e).__name__}): train first, or name another")

def load_weights(model, weights, path):
    """Loads a checkpoint's weights into model; exits if they are not this model's."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError):
        fail(f"the weights in {path} don't fit this model: was it written by another version?")
