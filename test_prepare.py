"""Preparation: any text to characters or strings, many documents to byte pairs. A section of test_tools.py.

It needs the helpers byte_pairs, call_in, everything, put, python, refused and script.
"""
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import time
import urllib.request
from collections import Counter
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from data import Tokenizer, load_data
from prepare_shakespeare import WORDS, join, joined
from test_tools import byte_pairs, call_in, everything, put, python, refused, script

# ---- preparation: any text to characters or strings

TEXT = "Grüße, 世界!\r\n" * 50
CODE = "def f(x):\n\tif x != '\"':\r\n        return  {x: 'don''t', 0xff: \"世界。\"}\n\n\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with data/ of several kinds."""
    monkeypatch.chdir(tmp_path)
    put({"abc.txt": "some text to learn", "empty.txt": "", "data/file": "",
         "data/begun/meta.json": '{"sources": 1}', "data/half/meta.json": "{"})
    shakespeare("abc.txt", "abc")
    put({"data/gpt2/meta.json": '{"vocab_size": 50257, "source": "s", "train_tokens": 1, "val_tokens": 1}',
         "data/gpt2/train.bin": b"\0\0", "data/gpt2/val.bin": b"\0\0"})
    return tmp_path


def shakespeare(path, dataset, *argv):
    script("prepare_shakespeare.py", "--input", path, "--dataset", dataset, "--vocab_size", "0", *argv)


def written(dataset):
    """(meta.json, {split: tokens}) of what is in data/<dataset>."""
    meta, splits = load_data(dataset, 1)
    return meta, {split: ids.tolist() for split, ids in splits.items()}


@pytest.mark.parametrize("name, content, argv, cut", [
    ("t.txt", TEXT.encode("utf-8-sig"), ["--like", "wide"], 540),
    ("t.XZ", lzma.compress(TEXT.encode()), ["--val", "val.txt"], 600)], ids=["like", "val"])
def test_characters_are_written_as_they_are(folder, name, content, argv, cut):
    put({name: content, "val.txt": "\ufeff世ü", "wide.txt": f"{TEXT}xyz"})
    shakespeare("wide.txt", "wide")
    shakespeare(name, "mine", *argv)
    meta, tokens = written("mine")
    val = TEXT[cut:] or "世ü"
    assert [Tokenizer(meta).decode(tokens[split]) for split in ("train", "val")] == [TEXT[:cut], val]
    assert [*meta["chars"]] == sorted(set(TEXT + "xyz" * ("--like" in argv)))
    assert (meta["source"], meta["val_chars"]) == (name, len(val))


@pytest.mark.parametrize("text, size", [
    ("".join(sorted(topics.values())), 2048), ("a page, a page", 11), ("".join(map(chr, range(2 ** 12))), 2 ** 12)],
    ids=["long", "short", "many characters"])
def test_without_vocab_size_there_are_2048_strings_or_what_the_text_gives(folder, text, size):
    put({"t.txt": text * 2})
    script("prepare_shakespeare.py", "--input", "t.txt", "--dataset", "mine")
    assert written("mine")[0]["vocab_size"] == size


@pytest.mark.parametrize("words", ["Don't|,| o'er|\n|it", "A|:| b|:|:", "x|...\n\n|  |y|?!|\t",
                                   "世界|。\n|_1| |-|2"])
def test_words_are_what_strings_stay_within(words):
    assert WORDS.findall(words.replace("|", "")) == words.split("|")


@pytest.mark.parametrize("text", [CODE * 4000, topics["lambda"] * 150], ids=["code", "prose"])
def test_strings_give_back_a_text_in_pieces_the_tokens_of_the_whole(folder, text):
    put({"t.txt": text.encode()})
    shakespeare("t.txt", "mine", "--vocab_size", "60")
    meta, tokens = written("mine")
    assert meta["vocab_size"] == 60
    cut = len(text) * 9 // 10
    for split, part in ("train", text[:cut]), ("val", text[cut:]):
        assert Tokenizer(meta).decode(tokens[split]) == part
        assert tokens[split] == Tokenizer(meta).encode(part)


def test_strings_come_of_the_most_frequent_neighbours_the_first_of_equal_ones():
    text = topics["for"] + " aaaaa aaa"
    words, strings = {word: [*word] for word in WORDS.findall(text)}, sorted(set(text))        # as first met
    times = Counter(WORDS.findall(text))
    while len(strings) < 200:
        pairs = Counter()
        for name, word in words.items():
            for pair in pairwise(word):
                pairs[pair] += times[name]
        pair = pairs.most_common(1)[0][0]               # of equal counts, the one that was met first
        strings.append("".join(pair))
        words = {name: join(word, pair, strings[-1]) for name, word in words.items()}
    assert joined(sorted(set(text)), text, 200) == strings


def test_counting_takes_seconds_and_no_list_of_all_tokens(folder):
    text = "\n".join(topics[name] for name in sorted(topics))
    began = time.process_time()
    assert len(joined(sorted(set(text)), text, 2048)) == 2048
    assert time.process_time() - began < 10                 # 3; 80 where all words are counted each time
    put({"page.txt": "слово и дело\n" * 200, "long.txt": "слово и дело\n" * 300_000})
    code = ("import prepare_shakespeare as p, resource\np.prepare('{0}', '{0}.txt', vocab_size=0)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    page, long = (int(python("-c", code.format(name)).stdout.split()[-1]) for name in ("page", "long"))
    assert (long - page) * 1024 / 3_900_000 - 2 < 4         # bytes a character beyond the text; it was 100


def test_tiny_shakespeare_or_the_text_inside_python_which_anything_may_replace(folder, monkeypatch, capsys):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: io.BytesIO(b"<html>not found</html>"))
    assert "sha256" in refused("prepare_shakespeare.py") and not os.path.exists("data/shakespeare")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: os.listdir("no network"))
    script("prepare_shakespeare.py")
    assert re.search(r"can't be downloaded \((.|\n)*of the Python reference", capsys.readouterr().out)
    full = python("-c", "import prepare_shakespeare as p, resource\np.prepare(path='abc.txt', vocab_size=0)\n"
                  "resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))\n"
                  "p.prepare(path='abc.txt', vocab_size=0)")
    assert full.returncode == 1 and "isn't written (OSError" in full.stderr
    assert not os.path.exists("data/shakespeare/meta.json")             # nobody takes half of it for whole
    shakespeare("abc.txt", "shakespeare")


def test_only_the_same_text_with_the_same_settings_is_written_anew(folder):
    put({"abc.txt": "some text to learn, edited", "other.txt": "another text to learn"})
    shakespeare("abc.txt", "abc")
    assert "," in written("abc")[0]["chars"]
    before = everything("data")
    for argv in (["other.txt", "abc"], ["abc.txt", "gpt2"], ["abc.txt", "abc", "--vocab_size", "20"],
                 ["abc.txt", "begun"]):
        with pytest.raises(SystemExit, match="name another --dataset"):
            shakespeare(*argv)
    assert everything("data") == before
    shakespeare("abc.txt", "half")


# ---- preparation: many documents to byte pairs

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


@pytest.fixture
def owt(folder):
    """Runs prepare_openwebtext.py."""
    byte_pairs()
    return lambda dataset, *argv: script("prepare_openwebtext.py", "--dataset", dataset, *argv)


def bins(dataset):
    """{split: its documents}, in the order they have in data/<dataset>."""
    meta, found = written(dataset)
    for split, ids in found.items():
        parts = np.split(ids, np.flatnonzero(np.equal(ids, 50256)) + 1)
        texts = [Tokenizer(meta).decode(part).removesuffix("<|endoftext|>") for part in parts]
        found[split] = [text for text in texts if text]
    assert meta["val_chars"] == len("".join(found["val"]))
    assert {*os.listdir(f"data/{dataset}")} == {"broken.txt", "meta.json", "train.bin", "val.bin"}
    return found


@pytest.mark.parametrize("name, content", [
    ("b.TXT.XZ", lzma.compress(PLAIN)), ("e.ndjson.gz", gzip.compress(LINES)), ("docs.tar", ARCHIVE),
    ("h.tgz", tar("w:gz", {"x/README": b"\xff", "._0.txt": b"\xff", "x/some.jsonl": LINES}))],
    ids=["xz", "ndjson", "tar", "tgz"])
def test_documents_of_every_kind_become_the_same_tokens(owt, name, content):
    put({name: content})
    owt("x", "--val_share=.3", "--input", Path(name).absolute().as_uri())       # an address: it is downloaded
    found = bins("x")
    assert sorted(found["train"] + found["val"]) == sorted(DOCUMENTS) and 4 < len(found["val"]) < 21


LETTERS = [f"{letter} document of some words" for letter in "abcdefghijklmnopqrst"]


@pytest.mark.parametrize("texts, share, least, most", [
    ([f"{' '.join(DOCUMENTS)} "] * 20, 0.0005, 0.0999, 0.1001),                 # copies of a text: it is cut
    (["one document"], 0.0005, 0.1, 0.5),
    (LETTERS[9:] + LETTERS, 0.0005, 0.09, 0.11),                                # one in 2,000 would be none
    (LETTERS * 9, 0.2, 0.05, 0.4),
    ([f"{i} {LETTERS[0] * 9}" for i in range(5000)], 0.015, 0.01, 0.02)])
def test_validation_is_never_empty_and_shares_no_text_with_training(owt, texts, share, least, most):
    put({"a.txt": BREAK.join(texts)})
    owt("x", f"--val_share={share}", "--input", "a.txt")
    meta, found = written("x")[0], bins("x")
    assert least <= meta["val_tokens"] / (meta["train_tokens"] + meta["val_tokens"]) <= most
    assert not {*found["train"]} & {*found["val"]}
    parts = "".join(found["train"] + found["val"])
    assert {*parts} == {*"".join(texts)} and all(text.strip() in parts for text in texts)


def test_folders_are_read_once_without_what_is_held_out(owt):
    put({"in/a.TXT": "first", "in/deep/b.jsonl": '{"content": "second"}', "in/d.parquet": "",
         "in/._c.txt": b"\xff", "held.txt": "held out",
         "long.txt": BREAK.join([f"{'a line of text ' * 9}\n" * 9000, "end"])})
    os.symlink("../held.txt", "in/h.txt")
    owt("x", "--val", "held.txt", "--field=content", "--input", "in", "in/a.TXT", "in", "long.txt")
    first, second, *pieces, end = bins("x")["train"]
    assert [first, second, end, *bins("x")["val"]] == ["first", "second", "end", "held out"]
    assert len(pieces) == 2 and max(map(len, pieces)) < 2 ** 20 + 200
    assert re.sub(r"\s", "", "".join(pieces)) == "alineoftext" * 81_000


MANY = [json.dumps({"text": f"document {i} of {'many ' * (i % 7)}"}) for i in range(1200)]


def dies_at(n, run):
    """Runs something in a process that is killed when it wants to write its journal after n times."""
    left, replace = [True] * n, os.replace
    if not os.fork():
        os.replace = lambda *paths: replace(*paths) if left and left.pop() else os._exit(9)
        with contextlib.suppress(BaseException):
            run()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9


@pytest.mark.parametrize("argv", [["--val_share=.1"], []])
def test_stopped_anywhere_it_ends_with_the_same_bytes(owt, monkeypatch, capsys, argv):
    put({"0.jsonl": "\n".join(MANY), "1.jsonl": "\n".join([*MANY[::-1], "broken"])})
    argv = [*argv, "--input", "0.jsonl", "1.jsonl"]
    owt("whole", *argv)
    said = capsys.readouterr().out.replace("whole", "cut")
    for n in range(6):
        dies_at(n, lambda: owt("cut", *argv))
    assert json.loads(everything("data")["data/cut/meta.json"])["read"] > 0

    def stop():
        raise KeyboardInterrupt

    def another():                                      # another process writes, too
        put({"data/cut/train.bin": Path("data/cut/train.bin").read_bytes() + b"its"})

    for owner, name, action, said_then in (
            (os, "replace", another, "by another process"), (Path, "write_text", stop, "KeyboardInterrupt"),
            (Path, "unlink", stop, "KeyboardInterrupt")):
        call_in(monkeypatch, 1, owner, name, action)
        assert said_then in refused("prepare_openwebtext.py", "--dataset=cut", *argv)
    owt("cut", *argv)
    assert capsys.readouterr().out == said and "\n1 broken lines" in said
    assert sorted(everything("data/cut").values()) == sorted(everything("data/whole").values())


def test_a_broken_line_is_skipped_counted_and_named(owt, capsys):
    wrong = [b"{bad", b'{"tex": "a"}', b'{"text": 7}', b"[1]", b'{"text": "caf\xe9"}', b'"text"']
    put({"b.jsonl": b"\n".join([b'{"text": "a"}', b'{"text": null}', b"", *wrong, b'{"text": "z"}']),
         "c.jsonl": '{"text": "held out"}', "d.jsonl": b"\n".join(wrong)})
    owt("x", "--input", "b.jsonl", "--val", "c.jsonl")
    assert bins("x") == {"train": ["a", "z"], "val": ["held out"]}
    said = capsys.readouterr().out
    assert "6 broken lines" in said and "KeyError('text')" in said
    assert all(f"b.jsonl, line {n} is no JSON with a string 'text'" in said for n in range(4, 9))
    assert Path("data/x/broken.txt").read_text().count("\n") == 6
    assert "no line of d.jsonl is right: see data/y/broken.txt" in refused(
        "prepare_openwebtext.py", "--dataset=y", "--input", "d.jsonl")


JSON = "\n".join(MANY * 9).encode()


@pytest.mark.parametrize("name, cut, whole", [
    ("boundary.tar", ARCHIVE[:SECOND], ARCHIVE),
    ("block.tar", ARCHIVE[:SECOND] + b"x" * 512 + ARCHIVE[SECOND + 512:], ARCHIVE),
    ("cut.jsonl.gz", gzip.compress(JSON)[:-900], gzip.compress(JSON))])
def test_what_cannot_be_read_is_named_and_mended_it_goes_on(owt, name, cut, whole):
    put({"0 a.txt": "first", "1.txt": PLAIN, name: cut})
    argv = ["--input", "0 a.txt", "1.txt", name]

    def says(words, *more):
        assert re.search(words, refused("prepare_openwebtext.py", "--dataset=x", *argv, *more))

    says(f"stopped at {name} .*Error")
    for more in "--val=1.txt", "--field=txt", "--val_share=.1":
        says("begun with other", more)
    part = everything("data")["data/x/train.bin"]
    put({"data/x/train.bin": part[:2], name: whole})
    says("lost a part")
    put({"data/x/train.bin": part})
    owt("x", *argv)
    owt("y", *argv)
    assert bins("x") == bins("y")


@pytest.mark.parametrize("argv, words", [
    ("shakespeare empty.txt", r"0 \+ 0 characters"), ("shakespeare bytes.txt", "be read as UTF-8"),
    ("shakespeare a.txt", " 1 kinds"), ("shakespeare rich.txt", " 65568 kinds"),
    ("shakespeare abc.txt --like gpt2", "gpt2 has no characters"),
    ("shakespeare abc.txt --vocab_size 9", "11 kinds, for 2 to 9 tokens"),
    ("shakespeare abc.txt --vocab_size 99", "99: this text gives 1. at most"),
    ("shakespeare wide.txt --like abc", r"2 .* abc lacks: 'é' \(2 times\), 'ü' \(1 times"),
    ("shakespeare abc.txt --dataset file", "data/file isn't written .* File exists"),
    ("openwebtext some.doc", "some.doc is neither a file"),
    ("openwebtext empty.txt", "0 tokens to train on, 0 to validate"),
    ("openwebtext abc.txt --val empty.txt", "0 to validate"),
    ("openwebtext http://127.0.0.1:9/a.tar", "stopped at http://127.0.0.1:9/a.tar .URLError.* goes on from there"),
    ("openwebtext abc.txt --dataset abc", "abc is finished"),
    ("openwebtext abc.txt --dataset half", "stopped at data/half .JSONDecodeError")])
def test_bad_text_is_refused_and_what_was_there_is_not_touched(owt, argv, words):
    put({"some.doc": "", "bytes.txt": b"\xff\xfe\0", "a.txt": "a" * 12,
         "wide.txt": "some text ééü", "rich.txt": "".join(map(chr, range(0x10000, 0x20020)))})
    before, (name, *argv) = everything("data"), argv.split()
    assert re.search(words, refused(f"prepare_{name}.py", "--dataset", "new", "--input", *argv))
    assert everything("data").items() >= before.items()
    assert b"train_tokens" not in everything("data").get("data/new/meta.json", b"")
