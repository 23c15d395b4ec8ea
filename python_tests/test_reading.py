"""Whatever a file holds, the readers give its content or a ValueError of one line, soon and in little memory."""

import bz2
import gzip
import json
import lzma
import os
import stat
import string
import time

import pytest
from hostile import check_line, refused
from hypothesis import given
from hypothesis import strategies as st

from align_ext.system.messages import reason_of, shown
from align_ext.system.reading import exists, open_file, parse_json, read_json, read_lines, read_text, read_yaml


def fifo(path):
    os.mkfifo(path)


def loop(path):
    path.symlink_to(path)


NO_FILES = {
    "nothing": (lambda path: None, "No such file"),
    "a folder": (lambda path: path.mkdir(), "it is a folder"),
    "a FIFO": (fifo, "no ordinary file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "no ordinary file"),
    "a dangling link": (lambda path: path.symlink_to("absent"), "No such file"),
    "a link to itself": (loop, "levels of symbolic links"),
    "a file below a file": (lambda path: path.parent.rmdir() or path.parent.write_text(""), "Not a directory"),
}


@pytest.mark.parametrize("read", [read_text, read_json, read_yaml, lambda path: list(read_lines(path))])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_ordinary_file_is_refused_by_its_name_without_waiting(kind, read, tmp_path):
    make, message = NO_FILES[kind]
    path = tmp_path / "folder" / "file.json"
    path.parent.mkdir()
    make(path)
    assert "file.json" in refused(read, path, match=message)


@pytest.fixture
def unreadable(tmp_path):
    """A file that its reader may not read, and a folder that it may not search; root becomes somebody else."""
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("{}")
    folder.mkdir()
    (folder / "inside").write_text("{}")
    root = os.geteuid() == 0
    for path in tmp_path.parents:
        if root and path.stat().st_uid == 0 and not path.stat().st_mode & stat.S_IXOTH:
            path.chmod(path.stat().st_mode | stat.S_IXOTH)
    tmp_path.chmod(0o755)
    file.chmod(0)
    folder.chmod(0)
    if root:
        os.seteuid(65534)
    yield file, folder / "inside"
    if root:
        os.seteuid(0)
    folder.chmod(0o755)


def test_a_file_that_may_not_be_read_says_so(unreadable):
    for path in unreadable:
        refused(read_text, path, match="Permission denied")
    refused(exists, unreadable[1], match="Permission denied")


def test_names_that_no_file_can_have_are_refused():
    for name in ("a\0b", "x" * 5000, "\ud800", "y" * 200 + "\n\x1b[31m"):
        refused(read_text, name, match="cannot read")
    assert not exists("/nowhere/at/all")


def test_text_is_bounded_also_inside_gzip(tmp_path):
    (tmp_path / "big").write_bytes(b"x" * 101)
    refused(read_text, tmp_path / "big", 100, match="larger than 100 bytes")
    assert read_text(tmp_path / "big", 101) == "x" * 101
    with gzip.open(tmp_path / "bomb.gz", "wb") as file:
        for _ in range(64):
            file.write(b"0" * (1 << 20))
    refused(read_text, tmp_path / "bomb.gz", match="larger than")
    refused(lambda: list(read_lines(tmp_path / "bomb.gz")), match="line 1: .*larger than")


def test_a_closed_gzip_leaves_no_descriptor_open(tmp_path):
    with gzip.open(tmp_path / "x.gz", "wb") as file:
        file.write(b"x")
    before = len(os.listdir("/proc/self/fd"))
    files = [open_file(tmp_path / "x.gz") for _ in range(5)]
    for file in files:
        assert file.read() == b"x"
        file.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "not UTF-8"])
def test_a_damaged_gzip_is_refused_with_the_line(damage, tmp_path):
    path, content = tmp_path / "rows.gz", bytearray(gzip.compress(b"".join(b"row %d\n" % i for i in range(9000))))
    if damage == "cut":
        content = content[:-20]
    elif damage == "flipped":
        content[-5] ^= 4
    elif damage == "text":
        content = b"no gzip at all"
    else:
        content = gzip.compress(b"good\n\xff\n")
    path.write_bytes(content)
    refused(lambda: list(read_lines(path)), match=r"rows\.gz")
    refused(read_text, path, match=r"rows\.gz")


BAD_JSON = {
    "brackets": "[" * 900 + "]" * 900,
    "many brackets": "[" * 200_000,
    "braces": '{"a":' * 70 + "1" + "}" * 70,
    "a long integer": "[" + "1" * 5000 + "]",
    "10**400": '{"r": 1' + "0" * 400 + "}",
    "2**63": f"[{2**63}]",
    "-2**63-1": f"[{-(2**63) - 1}]",
    "1e400": "[1e400]",
    "NaN": '{"r": NaN}',
    "Infinity": "[-Infinity]",
    "a key twice": '{"r": 1, "r": 2}',
    "a key twice of many": "{" + ",".join(f'"{i}": 1' for i in [*range(30_000), 29_999]) + "}",
    "a key twice inside": '[[{"a": {"b": 1, "b": 1}}]]',
    "nothing": "",
    "a mark before it": "\ufeff{}",
    "two": "{} {}",
    "half": '{"a": "',
    "a trailing comma": "[1,]",
    "a control character": '["\x01"]',
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_json_that_is_none_or_out_of_bounds_is_refused(case, tmp_path):
    refused(parse_json, BAD_JSON[case])
    (tmp_path / "x.json").write_text(BAD_JSON[case])
    refused(read_json, tmp_path / "x.json", match=r"x\.json is damaged")


def test_json_within_the_bounds_is_what_it_says(tmp_path):
    content = {"a": [1, -(2**63), 2**63 - 1, 1.5, True, None, "ü\u2028"], "b": {"c": {}}}
    (tmp_path / "x").write_text(json.dumps(content))
    assert read_json(tmp_path / "x") == content
    for text in ("[]", "3", '"x"', "null"):
        (tmp_path / "x").write_text(text)
        refused(read_json, tmp_path / "x", match="no JSON object")
    (tmp_path / "x").write_text(" " * (4 << 20) + "{}")
    refused(read_json, tmp_path / "x", match="larger than")


BAD_YAML = {
    "an alias": "a: &x [1]\nb: *x",
    "laughs": "a: &a [x, x]\n" + "\n".join(f"b{i}: &b{i} [*a, *a]" for i in range(20)),
    "itself": "&a [*a]",
    "a merge": "a: {b: 1}\n<<: {c: 2}",
    "a key twice": "lr: 1\nlr: 2",
    "a key twice inside": "a: {b: 1, b: 2}",
    "brackets": "a: " + "[" * 900 + "]" * 900,
    "braces": "a: " + "{a: " * 900 + "}" * 900,
    "indents": "\n".join(" " * i + "a:" for i in range(300)),
    "a long integer": "r: 1" + "0" * 5000,
    "10**400": "r: 1" + "0" * 400,
    "a Python object": "a: !!python/object/apply:os.system [ls]",
    "an empty integer": 'a: !!int ""',
    "an empty float": 'a: !!float ""',
    "no bool": "a: !!bool x",
    "no date": "a: !!timestamp x",
    "a date": "a: 2001-01-01",
    "no day": "a: 2001-99-99",
    "a set": "a: !!set {b, c}",
    "bytes": "a: !!binary aGVsbG8=",
    "pairs": "a: !!pairs [b: 1]",
    "a list": "- a",
    "a word": "abc",
    "a key that is a list": "? [a]\n: 1",
    "a key that is a map": "{{a: b}: c}",
    "a key that is a number": "3: 4",
    "a tab": "a:\n\t- b",
    "two documents": "a: 1\n---\nb: 2",
    "a zero": "a: \0",
    "an escape": "a: \x1b[31m",
    "unbalanced": "a: [",
    "large": "a: " + "x" * (1 << 17),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_yaml_that_is_none_or_out_of_bounds_is_refused(case, tmp_path):
    (tmp_path / "x.yaml").write_text(BAD_YAML[case])
    refused(read_yaml, tmp_path / "x.yaml", match=r"x\.yaml")


def test_yaml_within_the_bounds_is_what_it_says(tmp_path):
    (tmp_path / "x").write_text("a: 1\nb: [c, 2.5, null, yes]\nd: {e: 'f'}\n")
    assert read_yaml(tmp_path / "x") == {"a": 1, "b": ["c", 2.5, None, True], "d": {"e": "f"}}
    for empty in ("", "# nothing\n", "---\n", "null"):
        (tmp_path / "x").write_text(empty)
        assert read_yaml(tmp_path / "x") == {}


HOSTILE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
)


@given(HOSTILE)
def test_fuzz_any_value_is_shown_in_one_printable_line(value):
    text = shown(value)
    assert len(text) <= 80
    assert text.isprintable()
    assert reason_of(ValueError(text * 20)).isprintable()


def test_huge_values_are_shown_soon():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 50_000_000, 10**5000, list(range(1_000_000)), deep, b"\0" * 10_000_000):
        start = time.perf_counter()
        assert len(shown(value)) <= 80
        assert time.perf_counter() - start < 1
    while deep:  # freeing it recursively is not what is tested
        deep = deep[0]


@given(st.text() | st.text(alphabet='{}[]",:0123456789.eE-+ntruefalsN \n"') | st.text(alphabet=string.printable))
def test_fuzz_json_is_what_python_reads_or_refused(text):
    try:
        value = parse_json(text)
    except ValueError:
        return
    assert value == json.loads(text)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file"


YAML_WORDS = st.sampled_from(
    ["a", "b", ": ", ":", "- ", "[", "]", "{", "}", ", ", "\n", "  ", "&x ", "*x", "!!int ", "!!set ", "? ", "<<",
     "|\n", ">\n", "'", '"', "#", "---\n", "1", "1e5", ".nan", "0x1F", "yes", "~", "%YAML 1.1\n",
     "!!python/name:os", "\\x00"]
)  # fmt: skip


@given(st.lists(YAML_WORDS, max_size=40).map("".join) | st.text(max_size=60))
def test_fuzz_yaml_is_a_mapping_or_one_line(file, text):
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        content = read_yaml(file)
    except ValueError as error:
        check_line(error)
    else:
        assert isinstance(content, dict)
        json.dumps(content)


@given(st.binary(max_size=200))
def test_fuzz_bytes_are_text_or_one_line(file, content):
    file.write_bytes(content)
    for read in (read_text, read_json, read_yaml, lambda path: list(read_lines(path))):
        try:
            read(file)
        except ValueError as error:
            check_line(error)


TEXT = '{"task": "a", "prompt": "\u00e9", "completion": "x"}\n' * 3


@pytest.mark.parametrize(
    ("content", "name", "cure"),
    [
        (TEXT.encode("utf-16"), "x.jsonl", "it is UTF-16, not text in UTF-8: save it as UTF-8"),
        (TEXT.encode("utf-16-be"), "x.json", "it is UTF-16"), (TEXT.encode("utf-16-le"), "x.jsonl", "it is UTF-16"),
        (TEXT.encode("utf-32"), "x.jsonl", "it is UTF-32"), (TEXT.encode("utf-32-be"), "x.jsonl", "it is UTF-32"),
        (TEXT.encode("latin-1"), "x.jsonl", "perhaps in Latin-1 or Windows-1252: save it as UTF-8"),
        (gzip.compress(TEXT.encode()), "x.jsonl", "it is compressed: name it .gz"),
        (gzip.compress(gzip.compress(TEXT.encode())), "x.jsonl.gz", "it is compressed twice: unpack it once"),
        (b"PK\x03\x04" + bytes(range(256)), "x.jsonl", "it is zip, not text"),
        (bz2.compress(TEXT.encode()), "x.jsonl", "it is bzip2"), (lzma.compress(TEXT.encode()), "x.jsonl", "it is xz"),
        (b"PAR1" + bytes(100), "x.jsonl", "it is parquet"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_file_that_is_no_utf_8_is_named_for_what_it_is_with_the_cure(tmp_path, content, name, cure):
    (tmp_path / name).write_bytes(content)
    for read in (lambda path: list(read_lines(path)), read_text):
        with pytest.raises(ValueError, match=cure) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)
