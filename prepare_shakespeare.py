"""Any text to tokens: data/<dataset>/ with train.bin, val.bin and meta.json.

    python prepare_shakespeare.py                                   # downloads Tiny Shakespeare (1.1 MB)
    python prepare_shakespeare.py --input my.txt.gz --dataset my    # any UTF-8 text, plain, .gz or .xz
    python prepare_shakespeare.py --vocab_size 0 --dataset characters

A token is a string of up to a word, one of 2,048, or of as many as a short text gives. --vocab_size sets
another number; with 0, each character is a token.

meta.json has the string of each token (chars), where the text comes from, and how many tokens and characters
there are: with them, nats per token become bits per character. A folder that holds another text, or the same
one with other settings, is never overwritten; a text that was edited may be written anew.
"""
import gzip
import hashlib
import heapq
import json
import lzma
import os
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from urllib.request import urlopen

import numpy as np
from tqdm import tqdm

from config import fail
from data import Tokenizer, load_checkpoint, load_data

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
STAND_IN = "the Python reference"

# What a string never crosses: an apostrophe belongs to its word, a space to the word behind it, newlines to
# the punctuation before them. The colon stays alone, because in a play it ends the name of who speaks.
WORDS = re.compile(r" ?[\w']+|:|[^\w\s':]+\n*|\s+")
# A text is encoded in such pieces, because a list of all its tokens takes 50 times its memory. A piece ends
# behind a word, where no string goes on: so the tokens are those of the whole text.
PIECES = re.compile(r"(?s).{65536,131072}?(?<=\w)(?![\w'])|.{1,131072}")


def unpacked(path, stream=None):
    """A file to read bytes from, or in its place a stream, unpacked where path ends in .xz or .gz."""
    unpack = {".xz": lzma.open, ".gz": gzip.open}.get(os.path.splitext(path)[1].lower())
    if unpack:
        return unpack(stream or path)
    return stream or open(path, "rb")


def read(path):
    """The text of a UTF-8 file; exits if it isn't one."""
    try:
        with unpacked(path) as file:
            return file.read().decode("utf-8-sig")
    except Exception as e:  # noqa: BLE001 (each kind of packing has errors of its own)
        fail(f"{path} can't be read as UTF-8 text: {e}")


def download():
    """(text, what it is): Tiny Shakespeare, or without a network the English that ships inside Python."""
    try:
        raw = urlopen(URL, timeout=20).read()
    except Exception as e:  # noqa: BLE001 (the network has errors of all kinds)
        print(f"Tiny Shakespeare can't be downloaded ({e}): using {STAND_IN}; --input takes any text")
        return "\n\n".join(topics[name] for name in sorted(topics)), STAND_IN
    if hashlib.sha256(raw).hexdigest() != SHA256:
        fail(f"what {URL} sends isn't Tiny Shakespeare (its sha256 differs): pass --input FILE")
    return raw.decode(), "Tiny Shakespeare"


def join(word, pair, new):
    """word, a list of ids, with the id new wherever the two ids of pair stand side by side (aaa: new, a)."""
    out = []
    for i in word:
        if out and (out[-1], i) == pair:
            out[-1] = new
        else:
            out.append(i)
    return out


def joined(chars, text, size):
    """List of strings: chars, then what comes of joining, again and again, those two neighbours within words
    that are side by side most often in text (byte-pair encoding of characters, arXiv:1508.07909).

    There are size of them, or fewer where no two neighbours are left that occur twice. What makes it fast: a
    joining changes few words, and only their pairs are counted anew."""
    strings, found = list(chars), Counter(word[0] for word in WORDS.finditer(text))    # in order
    words, times = [[strings.index(c) for c in word] for word in found], list(found.values())
    counts, holders = Counter(), defaultdict(set)       # of a pair: how often it occurs; in which words
    heap = []                                           # (rank, pair): the one of lowest rank comes out first

    def count(w, sign):
        for pair in pairwise(words[w]):
            if pair not in holders:
                heapq.heappush(heap, ((-len(text),), pair))             # in front, until it is ranked
            counts[pair] += sign * times[w]
            holders[pair].add(w)

    def rank(pair):
        """The most frequent pair has the lowest; of equal ones, that which comes first in the words."""
        w = min(w for w in holders[pair] if pair in pairwise(words[w]))
        before = words[w][:list(pairwise(words[w])).index(pair)]
        return -counts[pair], w, sum(len(strings[i]) for i in before)

    for w in range(len(words)):
        count(w, 1)
    with tqdm(total=size, initial=len(strings), unit=" strings", delay=1) as bar:
        while heap and len(strings) < size:
            old, pair = heapq.heappop(heap)
            if counts[pair] < 2:
                continue
            if old != rank(pair):                       # other joinings took from it: back, further behind
                heapq.heappush(heap, (rank(pair), pair))
                continue
            strings.append(strings[pair[0]] + strings[pair[1]])
            for w in list(holders[pair]):
                count(w, -1)
                words[w] = join(words[w], pair, len(strings) - 1)
                count(w, 1)
            bar.update()
    return strings


def check(folder, settings):
    """Exits if folder holds what another text or other settings gave, or what isn't finished yet."""
    try:
        old = json.loads((folder / "meta.json").read_text("utf-8"))
    except (OSError, ValueError):                       # there is none, or a part of one
        return
    source = old.get("source", "what prepare_openwebtext.py hasn't finished")
    if old.get("settings") != settings and source != STAND_IN:
        fail(f"{folder} holds {source}, made with other settings: name another --dataset")


def write(path, text, tokenizer):
    """Writes the tokens of text to a file; returns their number."""
    pieces = tqdm(PIECES.finditer(text), total=len(text) // 2 ** 16, delay=1)
    with open(path, "wb") as file:
        file.writelines(np.array(tokenizer.encode(piece[0]), np.uint16) for piece in pieces)
        return file.tell() // 2


def prepare(dataset="shakespeare", path=None, val=None, like=None, vocab_size=None):
    """Writes data/<dataset>: nine tenths of a text to train on, the rest (or the file val) to validate."""
    text, source = (read(path), path) if path else download()
    size = 2048 if vocab_size is None else vocab_size
    settings, folder = [source, val, like, size], Path("data", dataset)
    check(folder, settings)
    cut = len(text) * 9 // 10
    text, rest = (text, read(val)) if val else (text[:cut], text[cut:])
    counts = Counter(text) + Counter(rest)
    chars = sorted(counts)
    if like:                                            # the alphabet of a model that is to be fine-tuned
        meta = load_checkpoint(like)["meta"] if like.endswith(".pt") else load_data(like, 1)[0]
        chars, size, vocab_size = meta.get("chars"), 0, None
        if chars is None:
            fail(f"{like} has no characters, but GPT-2's byte pairs: prepare_openwebtext.py writes those")
        lacking = [f"{c!r} ({n:,} times)" for c, n in counts.most_common() if c not in chars]
        if lacking:
            fail(f"{source} has {len(lacking)} characters that {like} lacks: {', '.join(lacking)}")
    most = min(vocab_size or 65_535, 65_535)            # uint16, and one is [MASK]
    if not (text and rest and 2 <= len(chars) <= most):
        fail(f"{source}: {len(text)} + {len(rest)} characters of {len(chars)} kinds, for 2 to {most} tokens")
    try:
        if size:
            chars = joined(chars, text[:2 ** 21], min(size, most))          # 2 M characters tell enough
            if vocab_size and len(chars) < most:
                fail(f"--vocab_size is {vocab_size:,}: this text gives {len(chars):,} at most")
        meta = {"chars": chars, "vocab_size": len(chars), "source": source, "settings": settings}
        tokenizer, meta_path = Tokenizer(meta), folder / "meta.json"
        folder.mkdir(parents=True, exist_ok=True)
        meta_path.unlink(missing_ok=True)               # until it is there, nobody takes the rest for whole
        meta["train_tokens"] = write(folder / "train.bin", text, tokenizer)
        meta["val_tokens"], meta["val_chars"] = write(folder / "val.bin", rest, tokenizer), len(rest)
        meta_path.write_text(json.dumps(meta, indent=1), "utf-8")
    except (OSError, KeyboardInterrupt) as e:
        fail(f"{folder} isn't written ({type(e).__name__}: {e}): the same command writes it anew")
    print(f"{folder}: {meta['train_tokens']:,} + {meta['val_tokens']:,} tokens of {source}, such as "
          f"{''.join(chars[-99:])[-99:]!a}")


def first_use(dataset):
    """Prepares data/shakespeare, or data/characters, when train.py asks for it and it isn't there."""
    folder = Path("data", dataset)
    meta_path = folder / "meta.json"
    if dataset in ("shakespeare", "characters") and not folder.exists():
        prepare(dataset, vocab_size=0 if dataset == "characters" else None)
    elif dataset == "shakespeare" and meta_path.exists() and '"settings"' not in meta_path.read_text("utf-8"):
        print(f"{folder} is of an older version, which took characters: delete it, and strings take their place")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--input", dest="path", help="a UTF-8 text file (default: download Tiny Shakespeare)")
    parser.add_argument("--dataset", default="shakespeare", help="name of the folder under data/")
    parser.add_argument("--val", help="a file to validate on (default: the last tenth of the text)")
    parser.add_argument("--like", help="a dataset or model.pt with the alphabet to use, to fine-tune a model")
    parser.add_argument("--vocab_size", type=int, help="tokens; 0: characters (default: 2048 or fewer)")
    prepare(**vars(parser.parse_args()))
