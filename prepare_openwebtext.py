"""Many documents to GPT-2 tokens: data/<dataset>/ with train.bin, val.bin and meta.json.

    python prepare_openwebtext.py                                      # OpenWebText: 13 GB to download
    python prepare_openwebtext.py --input folder more.jsonl.gz --val held_out.txt --dataset my

It reads .txt (documents between lines of <|endoftext|>), .jsonl and .ndjson, plain, .xz or .gz, and tars of
these, but no other file of a folder. A broken line of JSON is skipped, and named at the end.

Without --val, a digest of its text decides whether a document is for validation: copies of it go to the same
side. The default share, one in 2,000, is right for OpenWebText but leaves nothing of a book. So where that is
less than a hundredth of all tokens and less than 100,000, or more than a fifth of them and more than twice
--val_share, the last tenth of all tokens is for validation, wherever in a document it begins.

Stopped anywhere, by Ctrl-C, a crash or a full disk, the same command goes on, to the same bytes: every two
seconds progress.json notes which file is read, how many of its documents are done, and the sizes of the bins.
"""
import glob
import hashlib
import io
import json
import os
import re
import shlex
import shutil
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
from data import Tokenizer, replace_file
from prepare_shakespeare import unpacked

URL = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/urlsf_subset{:02d}.tar"
READ = re.compile(r"(?i)[^.].*(\.(txt|jsonl|ndjson|tar)(\.xz|\.gz)?|\.json\.(xz|gz)|\.tgz|_data\.xz)$")
JSON = re.compile(r"(?i)\.(json|jsonl|ndjson)(\.xz|\.gz)?$")
TAR = re.compile(r"(?i)(\.tar(\.xz|\.gz)?|\.tgz|_data\.xz)$")           # the last: inside OpenWebText's tars
LONGEST = 2 ** 20                           # characters of a document; a longer one becomes several
END = 50256                                 # <|endoftext|>, the last token of each document

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("--input", nargs="+", default=(), help="files and folders (default: OpenWebText)")
parser.add_argument("--val", nargs="+", default=(), help="files and folders for validation alone")
parser.add_argument("--dataset", default="openwebtext", help="name of the folder under data/")
parser.add_argument("--field", default="text", help="of JSON lines: the name of the text")
parser.add_argument("--val_share", type=float, default=0.0005, help="of the documents, without --val")
args = parser.parse_args()

if not 0 < args.val_share < 1:
    fail(f"--val_share is {args.val_share}: it must lie between 0 and 1")

# ---- from files to documents


class Download(io.RawIOBase):
    """The bytes at url; takes up a broken connection where it was, gives up after five breaks in a row."""

    def __init__(self, url):
        self.url, self.at, self.body = url, 0, None

    def read(self, n):
        for wait in 1, 2, 4, 8, 16, None:               # seconds
            try:
                if self.body is None:
                    rest = Request(self.url, headers={"Range": f"bytes={self.at}-"})
                    self.body = urlopen(rest, timeout=60)
                data = self.body.read(n)
                if self.body.status != 206 or self.body.length and not data:
                    raise OSError("the server sends no part of a file, or stopped in the middle of one")
                self.at += len(data)
                return data
            except OSError:
                if self.at == 0 or wait is None:        # it never began, or it doesn't go on
                    raise
                self.body = None
                time.sleep(wait)


def in_archive(name, stream):
    """Yields the documents of each file in a tar, as if it lay beside it."""
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tar:
            tar.members.clear()                         # else a million of them fill the memory
            if member.isfile() and is_read(member.name):
                inside = io.BytesIO(tar.extractfile(member).read())
                texts = documents(f"{name}/{member.name}", inside)
                if member.name.endswith("_data.xz"):    # as OpenWebText's usual loader does
                    texts = (re.sub("\n\n\n+", "\n\n", text) for text in texts)
                yield from texts
        # an archive ends in two blocks of zeros; tarfile itself takes any bad header for the end
        at_end = tar.fileobj.tell() == tar.offset + 512
        if not at_end or tar.fileobj.read(512).strip(b"\0"):
            raise tarfile.ReadError("the archive is cut short or damaged")


def in_json_lines(name, lines):
    """Yields the text of each line, None where there is none, and for a broken line a ValueError."""
    for number, line in enumerate(lines, 1):
        text = wrong = None
        try:
            if line.strip():
                text = json.loads(line)[args.field]
        except ValueError:
            wrong = "is no JSON in UTF-8"
        except (LookupError, TypeError):
            wrong = f"has no field {args.field!r}"
        if not isinstance(text, str | None):
            wrong = f"has {args.field!r}, but it is no string"
        yield ValueError(f"{name}, line {number} {wrong}") if wrong else text


def in_text(lines):
    """Yields what stands between the lines of <|endoftext|>; what is longer than LONGEST, in several parts,
    so that a document larger than the memory can be read as well."""
    text = ""
    while line := lines.readline(LONGEST):
        separator = line.strip() == "<|endoftext|>"
        if not separator:
            text += line
        if separator or len(text) >= LONGEST:
            yield text
            text = ""
    yield text


def documents(name, stream):
    """Yields the texts in a stream of that name, and a ValueError for each broken line of JSON."""
    if TAR.search(name):
        return in_archive(name, stream)
    plain = unpacked(name, stream)
    if JSON.search(name):
        return in_json_lines(name, plain)
    return in_text(io.TextIOWrapper(plain, "utf-8-sig", newline=""))


# ---- the sources: path of each file, once, and the share of its documents that is for validation


def is_read(path):
    """Whether files of that name are read: by its ending, and none that is hidden."""
    return READ.match(os.path.basename(path))


def find(given):
    """Paths of the files to read: given itself, or all those in the folder."""
    paths = [given]
    if os.path.isdir(given):
        paths = sorted(glob.glob(f"{glob.escape(given)}/**", recursive=True))
    paths = [path for path in paths if os.path.isfile(path) and is_read(path)]
    if not paths:
        fail(f"{given} is neither a file nor a folder of files of a kind that is read: see --help")
    return paths


sources = {}                                            # {real path: (path, share)}
if not args.input:
    sources = {i: (URL.format(i), 0 if args.val else args.val_share) for i in range(21)}
for given in args.input:
    for path in find(given):
        sources[os.path.realpath(path)] = path, 0 if args.val else args.val_share
for given in args.val:
    for path in find(given):                            # also where --input has named it already
        sources[os.path.realpath(path)] = path, 1

# ---- the journal in progress.json: how far it was at some moment, and the size that each bin had then.
# ---- What a bin has beyond that when the command goes on was written later, and is written again.

path = folder = Path("data", args.dataset)
journal, meta_path = folder / "progress.json", folder / "meta.json"


def digest(text):
    """64 hexadecimal digits that no other text has."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


done = {"command": shlex.join(["python", *sys.argv]),   # what finishes it
        "settings": digest(f"{args.field} {[*sources.values()]}"),
        "files": 0, "read": 0, "last": "",              # files that are done; documents of the next one
        "train": 0, "val": 0, "time": 0,                # bytes in the bins; when that was
        "broken": 0, "named": []}                       # how many broken lines; what is wrong with five


def resume():
    """Goes back to what the journal says; exits if the folder holds something else."""
    if journal.exists():
        old = json.loads(journal.read_text("utf-8"))
        if old["settings"] == done["settings"]:
            done.update(old, time=0)
        elif old["train"] + old["val"]:
            fail(f"{folder} is begun with other files or settings: name another --dataset")
    elif meta_path.exists():
        fail(f"{folder} is finished: name another --dataset")
    for name, bin in bins.items():
        if bin.tell() < done[name]:
            fail(f"{bin.name} has lost a part of its tokens: delete {folder}, or name another --dataset")
        bin.seek(bin.truncate(done[name]))


def keep(**changes):
    """Writes the journal, once the bins hold what it speaks of."""
    for name, bin in bins.items():
        bin.flush()
        done[name] = bin.tell()
    done.update(changes, time=time.time())
    replace_file(journal, lambda file: file.write(json.dumps(done).encode()))


# ---- tokens


def encode(texts, share):
    """Appends the tokens of texts to the bins. Equal texts have equal digests, so they go to the same one."""
    ids = bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count())
    for text, its in zip(texts, ids):
        place = int(digest(text), 16) / 2 ** 256        # from 0 to 1, as if drawn at random
        bins["val" if place < share else "train"].write(np.array([*its, END], np.uint16))
        bar.update(len(its) + 1)


def read(number, path, share):
    """Encodes what a file holds, behind what was done of it before; exits if no line of it is right."""
    n, right, wrong = 0, 0, []
    with Download(path) if "://" in path else open(path, "rb") as stream:
        found = documents(path, stream)
        while batch := list(islice(found, 256)):        # no more than this in memory
            texts = [text.strip() for text in batch if isinstance(text, str)]
            broken = [str(item) for item in batch if isinstance(item, ValueError)]
            n += len(batch)
            right += len(texts)
            wrong += broken[:5]
            if n > done["read"]:
                encode([text for text in texts if text], share)
                done["read"] = n
                done["broken"] += len(broken)
                done["named"] += broken[:5 - len(done["named"])]
                if time.time() > done["time"] + 2:      # seconds: what a stop costs at most
                    keep(last=digest(repr(batch)))
            elif n == done["read"] and done["last"] != digest(repr(batch)):
                fail(f"{path} has changed since {folder} was begun: name another --dataset")
    if wrong and not right:
        fail(f"no line of {path} is right: {wrong[0]}")
    done.update(files=number + 1, read=0)


def tokens(*names):
    """Yields what is in these bins, in pieces that fit in memory."""
    for name in names:
        with open(bins[name].name, "rb") as file:
            while len(ids := np.fromfile(file, np.uint16, 2 ** 20)):
                yield ids


def last_tenth():
    """Gives validation the last tenth of all tokens instead: all go to train.bin, then a tenth of it back.

    The journal is kept between these steps. Stopped at any of them, it begins again with all in train.bin.
    """
    train, val = bins.values()
    with open(val.name, "rb") as file:
        shutil.copyfileobj(file, train)
    cut = train.tell() // 2 * 9 // 10 * 2               # two bytes a token
    keep(val=0)
    val.seek(val.truncate(0))
    with open(train.name, "rb") as file:
        file.seek(cut)
        shutil.copyfileobj(file, val)
    keep(train=cut)
    train.seek(train.truncate(cut))


def finish():
    """Writes meta.json, and says what there is. The bins may be larger than the memory: read in pieces."""
    n_train, n_val = (bin.tell() // 2 for bin in bins.values())
    if not n_train or not n_val:
        fail(f"{folder} has {n_train} tokens to train on, {n_val} to validate: use another text, --dataset")
    ends, at, val_chars = [[-1]], 0, 0
    for ids in tokens("train", "val"):
        ends.append(at + np.flatnonzero(ids == END))
        at += len(ids)
    lengths = np.diff(np.concatenate(ends))             # of each document, with its <|endoftext|>
    for ids in tokens("val"):
        raw = bpe.decode_bytes(ids[ids != END].tolist())
        val_chars += len(re.sub(rb"[\x80-\xbf]", b"", raw))             # in UTF-8 these begin no character
    meta = {"vocab_size": 50257, "source": ", ".join(args.input)[:200] or "OpenWebText",
            "train_tokens": n_train, "val_tokens": n_val, "val_chars": val_chars}
    meta_path.write_text(json.dumps(meta, indent=1), "utf-8")
    journal.unlink()                                    # last: stopped before, the same command comes back here
    print(f"{folder}: {n_train:,} tokens to train on, {n_val:,} to validate; {len(lengths):,} documents of "
          f"{lengths.mean():,.1f} tokens in the mean, {np.median(lengths):,.0f} in the median, "
          f"{(lengths > 1024).mean():.1%} of them longer than 1,024")
    if done["broken"]:
        print(f"{done['broken']:,} broken lines were skipped, first of all: {'; '.join(done['named'])}")


try:
    bpe = Tokenizer({"vocab_size": 50257}).bpe
    folder.mkdir(parents=True, exist_ok=True)
    with (open(folder / "train.bin", "ab") as train, open(folder / "val.bin", "ab") as val,
          tqdm(unit=" tokens", unit_scale=True, delay=1) as bar):
        bins = {"train": train, "val": val}
        if os.name == "posix":                          # two processes would mix their tokens
            import fcntl
            fcntl.flock(train, fcntl.LOCK_EX | fcntl.LOCK_NB)
        resume()
        for number, (path, share) in enumerate(sources.values()):
            if number >= done["files"]:
                read(number, path, share)
        path = folder
        keep()
        n = (train.tell() + val.tell()) // 2
        n_val = val.tell() // 2
        few = n_val < min(n / 100, 100_000)
        many = n_val > max(n / 5, 2 * args.val_share * n) or n_val == n
        if not args.val and (few or many):
            last_tenth()
        finish()
except BlockingIOError:
    fail(f"{folder} is being prepared by another process: wait until that has finished")
except (Exception, KeyboardInterrupt) as e:  # noqa: BLE001 (each kind of packing has errors of its own)
    fail(f"stopped at {path} ({type(e).__name__}: {e}): the same command goes on from there")
