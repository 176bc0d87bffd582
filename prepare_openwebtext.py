"""Many documents to GPT-2 tokens: data/<dataset>/ with train.bin, val.bin and meta.json.

    python prepare_openwebtext.py                                      # OpenWebText: 13 GB to download
    python prepare_openwebtext.py --input folder more.jsonl.gz --val held_out.txt --dataset my

Reads .txt (documents between lines of <|endoftext|>), .jsonl, .ndjson, plain, .xz or .gz, and tars of these,
but no other file of a folder. Without --val, the first document is for validation, and one in 2,000 by a hash
of its text. Stopped anywhere, the same command goes on behind the last whole file, to the same bytes.
"""
import glob
import hashlib
import io
import json
import os
import re
import shlex
import sys
import tarfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from itertools import islice
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
from tqdm import tqdm

from config import fail
from data import Tokenizer, replace_file, unpacked

URL = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/urlsf_subset{:02d}.tar"
READ = re.compile(r"(?i)[^.].*(\.(txt|jsonl|ndjson|tar)(\.xz|\.gz)?|\.json\.(xz|gz)|\.tgz|_data\.xz)$")
TAR = re.compile(r"(?i)(\.tar(\.xz|\.gz)?|\.tgz|_data\.xz)$")           # the last: inside OpenWebText's tars
LONGEST = 2 ** 20                           # characters of a document; a longer one becomes several

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("--input", nargs="+", default=(), help="files and folders (default: OpenWebText)")
parser.add_argument("--val", nargs="+", default=(), help="files and folders for validation alone")
parser.add_argument("--dataset", default="openwebtext", help="name of the folder under data/")
parser.add_argument("--field", default="text", help="of JSON lines: the name of the text")
parser.add_argument("--val_share", type=float, default=0.0005, help="of the documents, without --val")
args = parser.parse_args()

class Download(io.RawIOBase):
    """The bytes at url; takes up a broken connection where it was, gives up after five breaks in a row."""

    def __init__(self, url):
        self.url, self.at, self.body = url, 0, None

    def read(self, n):
        for attempt in range(6):
            try:
                if self.body is None:
                    self.body = urlopen(Request(self.url, headers={"Range": f"bytes={self.at}-"}), timeout=60)
                data = self.body.read(n)
                if self.body.status != 206 or self.body.length and not data:
                    raise OSError("the server sends no part of a file, or stopped in the middle of one")
                self.at += len(data)
                return data
            except OSError:
                if not self.at or attempt == 5:         # it never began, or it doesn't go on
                    raise
                self.body = None
                time.sleep(2 ** attempt)

def documents(name, stream):
    """Yields the texts in a stream of that name; what is in an archive is read as if it lay beside it."""
    if TAR.search(name):
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                tar.members.clear()                     # else a million of them fill the memory
                if member.isfile() and READ.match(os.path.basename(member.name)):
                    inside = io.BytesIO(tar.extractfile(member).read())
                    for text in documents(f"{name}/{member.name}", inside):  # as OpenWebText's usual loader:
                        yield re.sub("\n\n\n+", "\n\n", text) if TAR.search(member.name) else text
            # an archive ends in two blocks of zeros; tarfile itself takes any bad header for the end
            if tar.fileobj.tell() != tar.offset + 512 or tar.fileobj.read(512).strip(b"\0"):
                raise tarfile.ReadError("the archive is cut short or damaged")
        return
    lines, text = io.TextIOWrapper(unpacked(name, stream), "utf-8-sig", newline=""), ""
    if re.search(r"(?i)\.(json|jsonl|ndjson)(\.xz|\.gz)?$", name):
        yield from (json.loads(line)[args.field] + "" for line in lines if line.strip())
        return
    for line in iter(lambda: lines.readline(LONGEST), ""):
        separator = line.strip() == "<|endoftext|>"
        text += "" if separator else line
        if separator or len(text) >= LONGEST:
            yield text
            text = ""
    yield text

def encoded(path):
    """Yields (a hash from 0 to 1, tokens) of each document in a file, in order, computed on all cores."""
    with Download(path) if "://" in path else open(path, "rb") as stream:
        texts = filter(None, map(str.strip, documents(path, stream)))
        while batch := [*islice(texts, 16 * os.cpu_count())]:           # no more than this in memory
            for text, ids in zip(batch, bpe.encode_ordinary_batch(batch, num_threads=os.cpu_count())):
                key = int(hashlib.blake2b(text.encode("utf-8", "replace")).hexdigest(), 16) / 2 ** 512
                yield key, np.array([*ids, 50256], np.uint16)           # <|endoftext|>

# ---- the files to read, each once: {real path: (path, share of documents for validation, size, time)}
share = 0 if args.val else args.val_share
sources, marks = {} if args.input else {url: (url, share) for url in map(URL.format, range(21))}, [""]
for given, share in [(path, share) for path in args.input] + [(path, 1) for path in args.val]:
    names = glob.glob(f"{glob.escape(given)}/**", recursive=True) if os.path.isdir(given) else [given]
    known = [name for name in sorted(names) if os.path.isfile(name) and READ.match(os.path.basename(name))]
    if not known:
        fail(f"{given} is neither a file nor a folder of files of a kind that is read: see --help")
    for name in known:
        sources[os.path.realpath(name)] = name, share, os.path.getsize(name), os.path.getmtime(name)
for source in sources.values():                         # fingerprints of settings and files until here
    marks.append(hashlib.sha256(json.dumps([marks[-1], args.field, source]).encode()).hexdigest())

# ---- their tokens; the journal has the mark of the last whole file, and the sizes of the bins behind it
path = folder = Path("data", args.dataset)
journal, meta_path, kept = folder / "progress.json", folder / "meta.json", 0
try:
    bpe, command = Tokenizer({"vocab_size": 50257}).bpe, shlex.join(["python", *sys.argv])
    folder.mkdir(parents=True, exist_ok=True)
    with (open(folder / "train.bin", "ab") as train, open(folder / "val.bin", "ab") as val,
          tqdm(unit=" tokens", unit_scale=True, delay=1) as bar):
        if os.name == "posix":                          # two processes would mix their tokens
            import fcntl
            fcntl.flock(train, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new = {"mark": None if meta_path.exists() else "", "train": 0, "val": 0}        # None: it is finished
        done = json.loads(journal.read_bytes()) if journal.exists() else new
        if done["mark"] not in marks or train.tell() < done["train"] or val.tell() < done["val"]:
            fail(f"{folder} is finished or begun with other files, settings (progress.json): use --dataset")
        train.seek(train.truncate(done["train"]))       # what was written behind the last whole file goes
        val.seek(val.truncate(done["val"]))
        for mark, (path, share, *_) in [*zip(marks, sources.values())][marks.index(done["mark"]):]:
            if time.time() > kept + 2:                  # seconds: what a crash costs at least
                for file in train, val:                 # the journal never promises what isn't on the disk
                    file.flush()
                    os.fsync(file.fileno())
                done.update(mark=mark, train=train.tell(), val=val.tell(), command=command)
                replace_file(journal, lambda file: file.write(json.dumps(done).encode()))
                kept = time.time()
            for key, ids in encoded(path):
                key = key if train.tell() + val.tell() else 0           # the first one is for validation
                (val if key < share else train).write(ids)
                bar.update(len(ids))
        meta = {"vocab_size": 50257, "source": ", ".join(args.input)[:200] or "OpenWebText",
                "train_tokens": train.tell() // 2, "val_tokens": val.tell() // 2}
    replace_file(meta_path, lambda file: file.write(json.dumps(meta, indent=1).encode()))
    journal.unlink()
except (Exception, KeyboardInterrupt) as e:  # noqa: BLE001 (each kind of packing has errors of its own)
    said = f"{e.msg} in {e.doc[:99].strip()!r}" if isinstance(e, json.JSONDecodeError) else e
    fail(f"stopped at {path} ({type(e).__name__}: {said}): alone, the same command goes on from there")
print(f"{folder}: {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate")
