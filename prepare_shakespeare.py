"""Any text to tokens: data/<dataset>/ with train.bin, val.bin and meta.json.

    python prepare_shakespeare.py                                   # downloads Tiny Shakespeare (1.1 MB)
    python prepare_shakespeare.py --input my.txt.gz --dataset my    # any UTF-8 text, plain, .gz or .xz
    python prepare_shakespeare.py --vocab_size 2048 --dataset words # tokens are strings of up to a word
"""
import hashlib
import json
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from urllib.request import urlopen

import numpy as np

from config import fail
from data import Tokenizer, load_checkpoint, load_data, replace_file, unpacked

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

def load(path):
    """(text, what it is): the file at path, else Tiny Shakespeare, else English that ships inside Python."""
    try:
        text = (unpacked(path) if path else urlopen(URL, timeout=20)).read().decode("utf-8-sig")
    except Exception as e:  # noqa: BLE001 (the network and each kind of packing have errors of their own)
        not path or fail(f"{path} can't be read as UTF-8 text: {e}")
        print(f"Tiny Shakespeare can't be downloaded ({e}): using Python's reference; --input takes any text")
        return "\n\n".join(topics[name] for name in sorted(topics)), "the Python reference"
    if not path and hashlib.sha256(text.encode()).hexdigest() != SHA256:
        fail(f"what {URL} sends isn't Tiny Shakespeare (its sha256 differs): pass --input FILE")
    return text, path or "Tiny Shakespeare"

def joined(chars, text, size):
    """List of strings: chars, then what comes of joining, again and again, those two neighbours within words
    that are side by side most often in text (arXiv:1508.07909), until there are size of them."""
    strings, words = [*chars], Counter(re.findall(r" ?\w+|[^\w\s]+|\s", text))
    words = {"".join(chr(strings.index(c)) for c in word): n for word, n in words.items()}  # chr(i): string i
    while len(strings) < size:
        pairs = Counter({"none": 1})                    # so that one is the most common
        for word, n in words.items():
            for a, b in pairwise(word):
                pairs[a + b] += n
        pair, n = pairs.most_common(1)[0]
        if n < 2:
            fail(f"--vocab_size is {size:,}: this text gives {len(strings):,} at most")
        strings.append("".join(strings[ord(c)] for c in pair))
        words = {word.replace(pair, chr(len(strings) - 1)): n for word, n in words.items()}
    return strings

def prepare(dataset="shakespeare", path=None, val=None, like=None, vocab_size=0):
    """Writes data/<dataset>: nine tenths of a text to train on, the rest (or the file val) to validate."""
    text, source = load(path)
    train, rest = (text, load(val)[0]) if val else (text[:-len(text) // 10], text[-len(text) // 10:])
    chars, folder = "".join(sorted(set(train + rest))), Path("data", dataset)
    if like:                                            # the alphabet of a model that is to be fine-tuned
        meta = load_checkpoint(like)["meta"] if like.endswith(".pt") else load_data(like, 1)[0]
        chars, vocab_size = meta.get("chars", ""), 0
    most = min(vocab_size or 65_535, 65_535)            # uint16, and one is [MASK]
    if not (train and rest and 2 <= len(chars) <= most):
        fail(f"{source}: {len(train)} + {len(rest)} characters of {len(chars)} kinds, for 2 to {most} tokens")
    chars = joined(chars, train[:2 ** 21], most) if vocab_size else chars      # 2 M characters tell: a minute
    meta = {"chars": chars, "vocab_size": len(chars), "source": source, "val_chars": len(rest)}
    tokens = [np.array(Tokenizer(meta).encode(part), np.uint16) for part in (train, rest)]
    meta |= {"train_tokens": len(tokens[0]), "val_tokens": len(tokens[1])}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)  # without it, nobody takes the rest for whole
        replace_file(folder / "train.bin", tokens[0].tofile)
        replace_file(folder / "val.bin", tokens[1].tofile)
        replace_file(folder / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))
    except (OSError, KeyboardInterrupt) as e:
        fail(f"{folder} isn't written ({type(e).__name__}: {e}): the same command writes it anew")
    print(f"{folder}: {len(tokens[0]):,} + {len(tokens[1]):,} tokens of {source}: {chars[-99:]!a}")

if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--input", dest="path", help="a UTF-8 text file (default: download Tiny Shakespeare)")
    parser.add_argument("--dataset", default="shakespeare", help="name of the folder under data/")
    parser.add_argument("--val", help="a file to validate on (default: the last tenth of the text)")
    parser.add_argument("--like", help="a dataset or model.pt with the alphabet to use, to fine-tune a model")
    parser.add_argument("--vocab_size", type=int, default=0, help="tokens, up to a word each; 0: characters")
    prepare(**vars(parser.parse_args()))
