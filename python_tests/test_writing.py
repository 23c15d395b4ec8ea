"""Folders and files are whole or not there, one process has them at a time, and nothing of anybody else's is lost."""

import contextlib
import errno
import multiprocessing
import os
import signal
import time

import pytest
import torch
from processes import python

from align_ext.system import writing
from align_ext.system.locks import LOCK, InUse, claimed
from align_ext.system.tensors import read_tensors, write_tensors
from align_ext.system.writing import atomic_file, atomic_folder, check_file, check_space, first_foreign_file, remove


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def fill(folder, text, names=("a", "t/b")):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("before", [(), ("a",), ("a", "t/b", "t/c")])
@pytest.mark.parametrize("others", [(), ("thesis.tex", "t/notes", "deep/er/x")])
def test_a_new_folder_takes_the_place_of_what_is_ours_and_of_nothing_else(tmp_path, before, others):
    target = tmp_path / "out"
    if before or others:
        target.mkdir()
    fill(target, "old", before)
    for name in others:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("mine")
    with atomic_folder(target, "a|t/[bc]") as new:
        fill(new, "new")
    found = {name: text for name, text in contents(target).items() if text is not None}
    assert found == {"a": "new", "t/b": "new"} | dict.fromkeys(others, "mine")
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_cannot_be_renamed_is_filled_in_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_folder(".", "a") as new:
        (new / "a").write_text("new")
    assert contents(tmp_path) == {"a": "new"}
    with atomic_folder(".", "a") as new:
        (new / "b").write_text("new")
    assert contents(tmp_path) == {"b": "new"}


def test_where_the_kernel_has_no_exchange_folders_are_swapped_by_renames_or_not_at_all(tmp_path, monkeypatch):
    def none(*_):
        writing.ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(writing, "_LIBC", type("C", (), {"renameat2": staticmethod(none)}))
    (tmp_path / "a").mkdir()
    fill(tmp_path / "a", "a", ["x"])
    with atomic_folder(tmp_path / "a", "x") as new:
        (new / "x").write_text("b")
    assert contents(tmp_path) == {"a": None, "a/x": "b"}
    rename, calls = os.rename, []

    def third(*names):
        calls.append(names)
        if len(calls) == 3:
            raise KeyboardInterrupt
        rename(*names)

    monkeypatch.setattr(os, "rename", third)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "a", "x") as new:
        (new / "x").write_text("c")
    assert contents(tmp_path) == {"a": None, "a/x": "b"}


def test_an_exception_leaves_no_trace_of_the_new_folder_nor_of_its_parents(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "deep/er/out") as new:
        (new / "x").write_text(str(1 / (new / "y").write_text("")))
    assert os.listdir(tmp_path) == []


def test_a_link_is_never_ours_and_what_it_points_to_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a").write_text("mine")
    (tmp_path / "out").mkdir()
    for name in ("a", "t"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    assert first_foreign_file(tmp_path / "out", ".*") == "a"
    remove(tmp_path / "out", ".*")
    assert (tmp_path / "out/t/a").read_text() == "mine"


def holds(folder, ready, end):
    with claimed(folder):
        ready.set()
        end.wait(60)


def start(folder, work=holds):
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=work, args=(folder, ready, end))
    process.start()
    assert ready.wait(60)
    return process, end


@pytest.mark.parametrize("killed", [True, False])
def test_a_claim_lasts_as_long_as_its_process(tmp_path, killed):
    process, end = start(tmp_path / "deep/out")
    with pytest.raises(InUse, match="another process is writing to"), claimed(tmp_path / "deep/out"):
        pass
    if killed:
        os.kill(process.pid, signal.SIGKILL)
    else:
        end.set()
    process.join(60)
    with claimed(tmp_path / "deep/out") as folder, claimed(folder):  # twice in one process
        assert os.listdir(folder) == [LOCK]
    assert not (tmp_path / "deep/out").exists()  # nor does what a dead process had made


def test_a_child_that_lives_on_does_not_keep_the_claim_of_a_process_that_died(tmp_path):
    code = (
        "import os, sys, time, pathlib\n"
        "from align_ext.system.writing import claimed\n"
        "with claimed(pathlib.Path(sys.argv[1])):\n"
        "    if os.fork() == 0: time.sleep(60)\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    first = python("-c", code, tmp_path / "out", cwd=tmp_path, start_new_session=True)
    try:
        assert first.stdout.readline() == "ready\n"
        time.sleep(0.2)  # for the child to close its copy
        first.kill()
        first.wait()
        with claimed(tmp_path / "out"):
            pass
    finally:
        os.killpg(first.pid, signal.SIGKILL)


def test_a_claim_that_is_waited_for_is_had_in_the_end(tmp_path):
    process, end = start(tmp_path / "out")
    end.set()
    with claimed(tmp_path / "out", wait=True) as folder:
        assert os.listdir(folder) == [LOCK]
    process.join(60)


def writes(folder, text):
    for _ in range(30):
        with atomic_folder(folder, "a|t/b") as new:
            fill(new, text)


def test_two_writers_of_one_folder_leave_the_whole_of_one(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=writes, args=(tmp_path / "out", text)) for text in "xyz"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(set(filter(None, contents(tmp_path / "out").values()))) == 1
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_dead_process_left_goes_and_what_a_living_one_works_on_stays(tmp_path):
    def slow(folder, ready, end):
        with atomic_folder(folder):
            ready.set()
            end.wait(60)

    for killed in (True, False):
        process, end = start(tmp_path / "out", slow)
        if killed:
            process.kill()
            process.join(60)
    with atomic_folder(tmp_path / "out") as new:
        (new / "third").write_text("")
    assert len(os.listdir(tmp_path)) == 2
    end.set()
    process.join(60)
    assert process.exitcode == 0
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("file", "file is a file"), ("file/below", "file is a file"), ("link", "a link to nothing"),
        ("n" * 300, "File name too long"), ("a\0b", "null byte"), ("/proc/none", "No such file"),
    ],
)  # fmt: skip
def test_a_place_that_no_folder_can_have_is_one_line(tmp_path, name, why):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match=why) as caught, claimed(tmp_path / "new" / ".." / name):
        pass
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "new") == ["file", "link"]


def test_a_file_is_whole_or_as_it_was_and_a_device_is_written_to(tmp_path):
    file = tmp_path / "x.json"
    with atomic_file(file) as new:
        new.write_text("one")
    with pytest.raises(ZeroDivisionError), atomic_file(file) as new:
        new.write_text(str(1 / (new.write_text("tw") - 2)))
    assert contents(tmp_path) == {"x.json": "one"}
    with atomic_file("/dev/null") as new:
        new.write_text("nothing")


def test_a_file_that_cannot_be_written_is_one_line_without_the_hidden_name(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"^cannot write .*file/x: Not a directory$"),
        atomic_file(tmp_path / "file/x") as new,
    ):
        new.write_text("one")
    with pytest.raises(OSError, match="absent"), atomic_file(tmp_path / "y") as new:
        new.write_text((tmp_path / "absent").read_text())


@pytest.mark.parametrize("name", [".", "none/x", "/proc/x", "n" * 300, "file/x", "a\0b"])
def test_a_file_that_cannot_be_written_is_known_before(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"--json=.* cannot be written: "):
        check_file("--json", name, "MARK")
    check_file("--json", "new", "MARK")
    assert contents(tmp_path) == {"file": "mine"}


@pytest.mark.parametrize("through", ["there", "link", "hard", "a/../there"])
def test_a_result_takes_the_place_of_a_result_and_of_nothing_else(tmp_path, through):
    file = tmp_path / "there"
    file.touch()
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "hard").hardlink_to(file)
    for content, free in (
        ("", True), ("a MARK", True), ("x" * 10**6 + "MARK" + "x" * 10**4, True), ("mine", False), ("\n", False),
        ("x" * 10**5 + "MARK" + "x" * 10**5, False),
    ):  # fmt: skip
        file.write_text(content)
        with contextlib.nullcontext() if free else pytest.raises(ValueError, match=r"--json=.* and would be lost"):
            check_file("--json", tmp_path / through, "MARK")
        assert file.read_text() == content
    check_file("--json", "/dev/null", "MARK")


def test_a_disk_that_is_too_small_is_known_before(tmp_path):
    check_space(tmp_path, 1)
    with pytest.raises(ValueError, match=r"has .* MB left, of 1000000000000.0 MB that will be written"):
        check_space(tmp_path, 10**18)


def test_the_same_tensors_are_written_as_the_same_bytes(tmp_path):
    """safetensors writes the metadata in a random order each time."""
    tensors, record = (
        {"b": torch.arange(3.0), "a": torch.ones(2, 2)},
        {"base": "caf\N{LATIN SMALL LETTER E WITH ACUTE}"},
    )
    files = [tmp_path / f"{i}.safetensors" for i in range(12)]
    for file in files:
        write_tensors(file, tensors, record)
    assert len({file.read_bytes() for file in files}) == 1
    found, content = read_tensors(files[0])
    assert found["b"].tolist() == [0.0, 1.0, 2.0]
    assert content["base"] == record["base"]
