"""Preparation: any text to characters or strings, many documents to byte pairs. A section of test_tools.py.

It needs HERE and the helpers everything, put, python, refused and script.
"""
import contextlib
import fcntl
import gzip
import http.server
import io
import itertools
import json
import lzma
import os
import re
import tarfile
import threading
import time
import urllib.request
from collections import Counter
from pydoc_data.topics import topics

import numpy as np
import pytest

from data import Tokenizer, load_data
from prepare_shakespeare import WORDS, joined
from test_tools import HERE, everything, put, python, refused, script

# ---- preparation: any text to characters or strings

TEXT = "Grüße, 世界!\r\n" * 50
CODE = "def f(x):\n\tif x != '\"':\r\n        return  {x: 'don''t', 0xff: \"世界。\"}\n\n\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with data/ of several kinds; busy is being prepared."""
    monkeypatch.chdir(tmp_path)
    put({"abc.txt": "some text to learn", "empty.txt": "", "data/file": "", "data/torn/progress.json": "{",
         "data/begun/progress.json": '{"command": "python prepare.py"}', "data/half/meta.json": "{"})
    script("prepare_shakespeare.py", "--input", "abc.txt", "--dataset", "abc", "--vocab_size", "0")
    put({"data/gpt2/meta.json": '{"vocab_size": 50257, "source": "s", "train_tokens": 1, "val_tokens": 1}',
         **dict.fromkeys(("data/gpt2/train.bin", "data/gpt2/val.bin", "data/busy/train.bin"), b"\0\0")})
    with open("data/busy/train.bin") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path


def written(dataset):
    """(meta.json, {split: tokens}) of what is in data/<dataset>."""
    meta, splits = load_data(dataset, 1)
    return meta, {split: ids.tolist() for split, ids in splits.items()}


@pytest.mark.parametrize("name, content, argv, cut", [
    ("t.txt", TEXT.encode("utf-8-sig"), [], 540), ("t.GZ", gzip.compress(TEXT.encode()), [], 540),
    ("t.xz", lzma.compress(TEXT.encode()), [], 540), ("t.txt", TEXT.encode(), ["--val", "val.txt"], 600),
    ("t.txt", TEXT.encode(), ["--like", "wide"], 540)])
def test_characters_are_written_as_they_are(folder, name, content, argv, cut):
    put({name: content, "val.txt": "\ufeff世ü", "wide.txt": f"{TEXT}xyz"})
    script("prepare_shakespeare.py", "--input", "wide.txt", "--dataset", "wide", "--vocab_size", "0")
    script("prepare_shakespeare.py", "--input", name, "--dataset", "mine", "--vocab_size", "0", *argv)
    meta, tokens = written("mine")
    assert Tokenizer(meta).decode(tokens["train"]) == TEXT[:cut]
    assert Tokenizer(meta).decode(tokens["val"]) == ("世ü" if "--val" in argv else TEXT[cut:])
    assert [*meta["chars"]] == sorted(set(TEXT + "xyz" * ("--like" in argv)))
    assert (meta["source"], meta["val_chars"]) == (name, 2 if "--val" in argv else 60)


@pytest.mark.parametrize("text, words", [
    ("Don't, o'er\nit", ["Don't", ",", " o'er", "\n", "it"]), ("A: b::", ["A", ":", " b", ":", ":"]),
    ("x...\n\n  y?!\t", ["x", "...\n\n", "  ", "y", "?!", "\t"]),
    ("世界。\n_1 -2", ["世界", "。\n", "_1", " ", "-", "2"])])
def test_words_are_what_strings_stay_within(text, words):
    assert WORDS.findall(text) == words


@pytest.mark.parametrize("text, size", [
    (CODE * 4000, "60"), ("ab" * 2 ** 18, "15"), (topics["lambda"] * 150, "60")],
    ids=["code", "one word", "prose"])
def test_strings_give_back_a_text_in_pieces_the_tokens_of_the_whole(folder, text, size):
    put({"t.txt": text.encode()})
    script("prepare_shakespeare.py", "--input", "t.txt", "--dataset", "mine", "--vocab_size", size)
    meta, tokens = written("mine")
    assert meta["vocab_size"] == int(size)
    for split, part in ("train", text[:len(text) * 9 // 10]), ("val", text[len(text) * 9 // 10:]):
        assert Tokenizer(meta).decode(tokens[split]) == part
        whole = Tokenizer(meta).encode(part)
        assert tokens[split] == whole or text.startswith("abab") and len(tokens[split]) <= len(whole) + 3


def test_strings_come_of_the_most_frequent_neighbours_the_first_of_equal_ones():
    text = topics["for"] + " aaaaa aaa"
    words, strings = {word: [*word] for word in WORDS.findall(text)}, sorted(set(text))        # as first met
    times = Counter(WORDS.findall(text))
    while len(strings) < 200:
        pairs = Counter()
        for name, word in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times[name]
        (a, b), _ = pairs.most_common(1)[0]             # of equal counts, the one that was met first
        strings.append(a + b)
        for word in words.values():
            for i in range(len(word)):
                if word[i:i + 2] == [a, b]:
                    word[i:i + 2] = [a + b]
    assert joined(sorted(set(text)), text, 200) == strings
    assert joined("ab", "abab", 99) == ["a", "b", "ab"]     # nothing is left that occurs twice


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
    script("prepare_shakespeare.py", "--input", "abc.txt", "--vocab_size", "0")


def test_only_the_same_text_with_the_same_settings_is_written_anew(folder):
    put({"abc.txt": "some text to learn, edited"})
    script("prepare_shakespeare.py", "--input", "abc.txt", "--dataset", "abc", "--vocab_size", "0")
    assert "," in written("abc")[0]["chars"]
    put({"other.txt": "another text to learn"})
    before = everything("data")
    for argv in (["other.txt", "--dataset", "abc", "--vocab_size", "0"], ["abc.txt", "--dataset", "gpt2"],
                 ["abc.txt", "--dataset", "abc", "--vocab_size", "20"], ["abc.txt", "--dataset", "begun"]):
        assert "name another --dataset" in refused("prepare_shakespeare.py", "--input", *argv)
    assert everything("data") == before
    script("prepare_shakespeare.py", "--input", "abc.txt", "--dataset", "half", "--vocab_size", "0")


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
    try:
        Tokenizer({"vocab_size": 50257})
    except SystemExit:
        pytest.skip("GPT-2's byte pairs aren't here: set TIKTOKEN_CACHE_DIR or connect once")
    return lambda dataset, *argv: script("prepare_openwebtext.py", "--dataset", dataset, *argv)


def bins(dataset):
    """{split: its documents}, in the order they have in data/<dataset>."""
    (meta, tokens), found = written(dataset), {}
    for split, ids in tokens.items():
        ends = [i for i, token in enumerate(ids) if token == 50256]
        texts = [Tokenizer(meta).decode(ids[i + 1:j]) for i, j in itertools.pairwise([-1, *ends, len(ids)])]
        found[split] = [text for text in texts if text]
    assert meta["val_chars"] == len("".join(found["val"]))
    assert sorted(os.listdir(f"data/{dataset}")) == ["meta.json", "train.bin", "val.bin"]
    return found


@pytest.mark.parametrize("name, content", [
    ("a.txt", PLAIN), ("b.TXT.XZ", lzma.compress(PLAIN)), ("e.ndjson.gz", gzip.compress(LINES)),
    ("f.json.xz", lzma.compress(LINES)), ("docs.tar", ARCHIVE),
    ("h.tar.xz", tar("w:xz", {"x/README": b"\xff", "._0.txt": b"\xff", "x/some.jsonl": LINES})),
    ("i.tgz", tar("w:gz", {"a.txt.gz": gzip.compress(BREAK.join(DOCUMENTS[:20]).encode()),
                           "b.txt.xz": lzma.compress(BREAK.join(DOCUMENTS[20:]).encode())}))])
def test_documents_of_every_kind_become_the_same_tokens(owt, capsys, name, content):
    put({name: content})
    owt("x", "--val_share=.3", "--input", name)
    found = bins("x")
    assert sorted(itertools.chain(*found.values())) == sorted(DOCUMENTS) and 4 < len(found["val"]) < 21
    sizes = [len(Tokenizer({"vocab_size": 50257}).encode(text)) + 1 for text in DOCUMENTS]
    assert (f"; 41 documents of {np.mean(sizes):.1f} tokens in the mean, "
            f"{np.median(sizes):.0f} in the median, 0.0% of them longer") in capsys.readouterr().out


LETTERS = [f"{letter} document of some words" for letter in "abcdefghijklmnopqrst"]


@pytest.mark.parametrize("texts, argv, least, most", [
    ([" ".join(DOCUMENTS) * 20], [], 0.0999, 0.1001),                           # a book of 1.1 M characters
    (["one document"], [], 0.1, 0.5), (["one"], ["--val_share=.6"], 0.3, 0.7),
    (LETTERS, [], 0.09, 0.11),                                                  # one in 2,000 would be none
    (LETTERS * 9, ["--val_share=.2"], 0.05, 0.4), (LETTERS * 9, ["--val_share=.5"], 0.25, 0.75),
    ([f"{i} {LETTERS[0] * 9}" for i in range(5000)], ["--val_share=.015"], 0.01, 0.02)],
    ids=["book", "one", "two tokens", "few", "copies", "half", "many"])
def test_validation_is_never_empty_and_shares_no_text_with_training(owt, texts, argv, least, most):
    put({"a.txt": BREAK.join(texts)})
    owt("x", *argv, "--input", "a.txt")
    meta, found = written("x")[0], bins("x")
    assert least <= meta["val_tokens"] / (meta["train_tokens"] + meta["val_tokens"]) <= most
    assert not argv or len(texts) == 1 or not {*found["train"]} & {*found["val"]}
    assert "".join(sorted("".join(itertools.chain(*found.values())))) == "".join(sorted("".join(texts)))


def test_folders_are_read_once_without_what_is_held_out(owt):
    put({"in/a.TXT": "first", "in/deep/b.jsonl": '{"content": "second"}', "in/LICENSE": "",
         "in/._c.txt": b"\xff", "in/d.parquet": "", "held.txt": "held out",
         "else/f.tar": tar("w", {"f.txt": b"third\n\n\n\nof them"})})
    for name, target in ("linked", "../else"), ("no.txt", "no"), ("deep/up", ".."), ("h.txt", "../held.txt"):
        os.symlink(target, f"in/{name}")
    owt("x", "--val", "held.txt", "--field=content", "--input", "in", "in/a.TXT", "in")
    assert bins("x") == {"train": ["first", "second", "third\n\n\n\nof them"], "val": ["held out"]}
    put({"long.txt": BREAK.join([f"{'a line of text ' * 9}\n" * 9000, "words " * 200_000, "end"])})
    owt("y", "--val", "held.txt", "--input", "long.txt")    # documents larger than memory come in pieces
    *pieces, end = bins("y")["train"]
    assert len(pieces) == 4 and max(map(len, pieces)) < 2 ** 20 + 200 and end == "end"
    assert re.sub(r"\s", "", "".join(pieces)) == "alineoftext" * 81_000 + "words" * 200_000


def journal(dataset):
    with open(f"data/{dataset}/progress.json") as f:
        return json.load(f)


MANY = [json.dumps({"text": f"document {i} of {'many ' * (i % 7)}"}) for i in range(900)]      # four batches


@pytest.mark.parametrize("argv", [["--val_share=.1"], []])
def test_stopped_anywhere_it_ends_with_the_same_bytes(owt, monkeypatch, capsys, argv):
    put({"0.jsonl": "\n".join(MANY), "1.jsonl": "\n".join([*MANY[::-1], "broken"])})
    argv = [*argv, "--input", "0.jsonl", "1.jsonl"]
    owt("whole", *argv)
    said = capsys.readouterr().out.partition(":")[2]
    code = (f"import itertools, os, resource, runpy, sys, time\n"
            "time.time, replace, calls = itertools.count(0, 9).__next__, os.replace, []\n"
            f"sys.argv = {['x', '--dataset', 'cut', *argv]}\n%s\n"
            f"runpy.run_path('{HERE}/prepare_openwebtext.py')")             # the journal is kept each time
    kill = "os.replace = lambda *paths: os._exit(9) if len(calls) == 2 else calls.append(replace(*paths))"
    assert python("-c", code % kill).returncode == 9
    assert journal("cut")["read"] == 512 and not os.path.exists("data/cut/meta.json")
    assert re.search("data/cut can't be used .* goes on with it", refused("train.py", "--dataset=cut"))
    full = python("-c", code % "resource.setrlimit(resource.RLIMIT_FSIZE, (16000, 16000))")
    assert full.returncode == 1 and "Traceback" not in full.stderr
    assert re.search("error: stopped at .* File too large.*the same command goes on", full.stderr)
    monkeypatch.setattr(time, "time", itertools.count(0, 9).__next__)
    ways, replace, stops = ["on", "behind", "on", "on", "before", *["on"] * 4, "behind"] * 9, os.replace, 0

    def stopping(*paths):
        way = ways.pop(0)
        if way != "before":
            replace(*paths)
        if way != "on":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopping)
    while not os.path.exists("data/cut/meta.json"):
        with contextlib.suppress(SystemExit):
            owt("cut", *argv)
        stops += 1
    assert stops > 1
    assert capsys.readouterr().out.partition(":")[2] == said and "\n1 broken lines" in said
    assert sorted(everything("data/cut").values()) == sorted(everything("data/whole").values())
    assert "is finished: name another --dataset" in refused("prepare_openwebtext.py", "--dataset=cut", *argv)


def test_a_broken_line_is_skipped_counted_and_named(owt, capsys):
    wrong = [b"{bad", b'{"tex": "a"}', b'{"text": 7}', b"[1]", b'{"text": "caf\xe9"}', b'"text"', b"\xff"]
    put({"b.jsonl": b"\n".join([b'{"text": "a"}', b'{"text": null}', b"", *wrong, b'{"text": "z"}']),
         "c.jsonl": '{"text": "held out"}'})
    owt("x", "--input", "b.jsonl", "--val", "c.jsonl")
    assert bins("x") == {"train": ["a", "z"], "val": ["held out"]}
    said = capsys.readouterr().out
    assert "7 broken lines" in said and all(f"b.jsonl, line {n} " in said for n in range(4, 9))
    for what in "is no JSON in UTF-8", "has no field 'text'", "has 'text', but it is no string":
        assert what in said
    put({"d.jsonl": b"\n".join(wrong)})
    assert "no line of d.jsonl is right: d.jsonl, line 1 is no" in refused(
        "prepare_openwebtext.py", "--dataset=y", "--input", "d.jsonl")
    owt("y", "--input", "b.jsonl")                          # nothing had been done: other files may begin


@pytest.mark.parametrize("name, content, mended, words", [
    ("boundary.tar", ARCHIVE[:SECOND], ARCHIVE, "cut short"),
    ("block.tar", ARCHIVE[:SECOND] + b"x" * 512 + ARCHIVE[SECOND + 512:], ARCHIVE, "cut short or damaged"),
    ("cut.txt.xz", lzma.compress(PLAIN)[:-20], lzma.compress(PLAIN), "stopped at cut.txt.xz .*Error"),
    ("cut.jsonl.gz", gzip.compress("\n".join(MANY * 9).encode())[:-900],
     gzip.compress("\n".join(MANY * 9).encode()), "stopped at cut.jsonl.gz .*Error")])
def test_what_cannot_be_read_is_named_and_mended_it_goes_on(owt, monkeypatch, name, content, mended, words):
    monkeypatch.setattr(time, "time", itertools.count(0, 9).__next__)           # it is kept after each batch
    paths = ["0 a.txt", "1.txt", name, "z.txt"]
    put({"0 a.txt": "first", "1.txt": PLAIN, name: content, "z.txt": "last"})
    assert re.search(words, refused("prepare_openwebtext.py", "--dataset=x", "--input", *paths))
    command = journal("x")["command"]
    assert re.match("python .*prepare_openwebtext.py .* '0 a.txt' 1.txt ", command)
    for argv in paths[1:], [*paths, "--field=txt"], [*paths, "--val_share=.1"]:
        assert "begun with other" in refused("prepare_openwebtext.py", "--dataset=x", "--input", *argv)
    part = everything("data/x")["data/x/train.bin"]
    put({"data/x/train.bin": part[:2]})
    assert "has lost" in refused("prepare_openwebtext.py", "--dataset=x", "--input", *paths)
    put({"data/x/train.bin": part, name: mended, "z.txt": "another last"})
    owt("x", "--input", *paths)
    owt("y", "--input", *paths)
    assert bins("x") == bins("y")


def test_a_file_that_changed_in_the_middle_is_refused(owt, monkeypatch):
    monkeypatch.setattr(time, "time", itertools.count(0, 9).__next__)
    put({"a.json.gz": gzip.compress("\n".join(MANY * 9).encode())[:-900]})
    refused("prepare_openwebtext.py", "--dataset=x", "--input", "a.json.gz")
    put({"a.json.gz": gzip.compress("\n".join(MANY[1:] * 9).encode())})
    assert "a.json.gz has changed" in refused("prepare_openwebtext.py", "--dataset=x", "--input", "a.json.gz")


def test_a_download_goes_on_where_the_connection_broke(owt, monkeypatch):
    urlopen, requests, status, last = urllib.request.urlopen, [], 206, 10 ** 9

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            at = int(self.headers["Range"][6:-1])
            requests.append((self.path, at))
            self.send_response(status)
            self.send_header("Content-Length", str(len(ARCHIVE) - at))
            self.end_headers()
            if at < last:
                self.wfile.write(ARCHIVE[at:at + 9000])     # and no more: the connection ends early

        def log_message(self, *_):
            pass

    def local(request, **kwargs):                           # in place of huggingface.co
        request.full_url = f"http://127.0.0.1:{server.server_port}/{request.full_url[-6:]}"
        return urlopen(request, **kwargs)

    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(urllib.request, "urlopen", local)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        owt("y", "--val_share=.3")
        assert {at for path, at in requests if path == "/20.tar"} >= {0, 9000, 18000}
        for words, n, *answer in ("HTTP Error 404", 1, 404, 1), ("stopped in the middle", 6, 206, 1):
            requests.clear()
            status, last = answer
            said = refused("prepare_openwebtext.py", "--dataset=z")
            assert re.search(f"stopped at https.*00.tar .*{words}", said)
            assert len(requests) == n                       # five breaks in a row are too many
        server.shutdown()
    assert sorted(itertools.chain(*bins("y").values())) == sorted(DOCUMENTS * 21)


@pytest.mark.parametrize("name, argv, words", [
    ("shakespeare", ["empty.txt"], r"0 \+ 0 characters"), ("shakespeare", ["bytes.txt"], "be read as UTF-8"),
    ("shakespeare", ["a.txt"], " 1 kinds"), ("shakespeare", ["rich.txt"], " 65568 kinds"),
    ("shakespeare", ["none.txt"], "none.txt can't be read"),
    ("shakespeare", ["abc.txt", "--val", "empty.txt"], r"\+ 0 characters"),
    ("shakespeare", ["abc.txt", "--like", "gpt2"], "gpt2 has no characters"),
    ("shakespeare", ["abc.txt", "--vocab_size", "9"], "11 kinds, for 2 to 9 tokens"),
    ("shakespeare", ["abc.txt", "--vocab_size", "99"], "99: this text gives 1. at most"),
    ("shakespeare", ["wide.txt", "--like", "abc"], r"2 .* abc lacks: 'é' \(2 times\), 'ü' \(1 times"),
    ("shakespeare", ["abc.txt", "--dataset", "file"], "data/file isn't written .* File exists"),
    ("openwebtext", ["some.doc"], "some.doc is neither a file"),
    ("openwebtext", ["empty.txt"], "0 tokens to train on, 0 to validate"),
    ("openwebtext", ["abc.txt", "--val", "empty.txt"], "0 to validate"),
    ("openwebtext", ["abc.txt", "--val_share=5"], "must lie between 0 and 1"),
    ("openwebtext", ["abc.txt", "--dataset", "abc"], "abc is finished"),
    ("openwebtext", ["abc.txt", "--dataset", "torn"], "stopped at data/torn .JSONDecodeError"),
    ("openwebtext", ["abc.txt", "--dataset", "busy"], "data/busy is being prepared by another process")])
def test_bad_text_is_refused_and_what_was_there_is_not_touched(owt, name, argv, words):
    put({"some.doc": "", "bytes.txt": b"\xff\xfe\0", "a.txt": "a" * 12,
         "wide.txt": "some text ééü", "rich.txt": "".join(map(chr, range(0x10000, 0x20020)))})
    before = everything("data")
    assert re.search(words, refused(f"prepare_{name}.py", "--dataset", "new", "--input", *argv))
    assert {path: raw for path, raw in everything("data").items() if path in before} == before
    assert not os.path.exists("data/new/meta.json")
