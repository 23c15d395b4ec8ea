"""--push-to-hub with huggingface_hub's client, to a hub on this machine."""

import functools
import json

import pytest
from hf import hub
from hf.words import model_folder, write_rows
from processes import python

TINY = ("--model", "model", "--data", "rows.jsonl", "--steps", 2, "--eval-examples", 2, "--device", "cpu", "--dtype",
        "float32", "--checks", "none")  # fmt: skip


@pytest.fixture
def tiny(run, tmp_path):
    model_folder(tmp_path / "work/model")
    write_rows(tmp_path / "work/rows.jsonl")
    return run


@pytest.fixture
def connect(monkeypatch):
    return functools.partial(hub.connect, monkeypatch)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_whole(folder):
    assert {"report.html", "results.json", "rows.jsonl.gz", "adapter"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "results.json").read_text())["after"]["tasks"]


def test_what_arrives_is_the_adapter_with_its_card(tiny, connect, tmp_path):
    with hub.hub() as server:
        connect(server)
        code, said, _ = tiny("train", *TINY, "--output", "out", "--push-to-hub", "--hub-model-id", "we/ours",
                             "--hub-private-repo")  # fmt: skip
    assert code == 0
    assert f"uploaded to {server.address}/we/ours" in said
    (created,) = server.created
    assert (created["organization"], created["name"], created["visibility"]) == ("we", "ours", "private")
    assert server.files == {"we/ours": contents(tmp_path / "work/out/adapter")}
    assert server.files["we/ours"]["README.md"].startswith(b"---\nlibrary_name: peft\n")
    assert_whole(tmp_path / "work/out")


@pytest.mark.parametrize("refused", ["/api/repos/create", "/commit/main"])
def test_an_upload_that_is_refused_leaves_the_run_whole_and_names_the_cure(tiny, connect, tmp_path, refused):
    with hub.hub(refused=refused) as server:
        connect(server)
        code, _, error = tiny("train", *TINY, "--output", "out", "--push-to-hub", "--hub-private-repo")
    assert code == 2
    (line,) = [line for line in error.splitlines() if line.startswith("align-lora: ")]
    assert "the adapter was not uploaded to 'out': " in line
    assert "403" in line
    assert line.endswith("; the run is whole: hf upload out out/adapter --private")
    assert not server.files
    assert_whole(tmp_path / "work/out")


def test_a_hub_that_goes_down_during_the_run_leaves_it_whole(tiny, connect, tmp_path):
    with hub.hub(refused="/api/repos/create", answers=False) as server:
        connect(server)
        code, _, error = tiny("train", *TINY, "--output", "out", "--push-to-hub")
    assert code == 2
    assert "the adapter was not uploaded to 'out': " in error
    assert "Traceback" not in error
    assert_whole(tmp_path / "work/out")


def test_a_hub_that_is_down_or_refuses_the_token_is_known_before_the_run(tiny, connect, tmp_path):
    with hub.hub(refused="/api/whoami-v2") as server:
        connect(server)
        refused = tiny("train", *TINY, "--output", "out", "--push-to-hub")
    down = tiny("train", *TINY, "--output", "out", "--push-to-hub")
    for code, _, error in (refused, down):
        assert code == 2
        assert "(hf auth login, or HF_TOKEN)" in error
    assert not (tmp_path / "work/out").exists()


@pytest.mark.slow
def test_an_upload_by_the_command_with_the_librarys_variables(tmp_path):
    model_folder(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    with hub.hub() as server:
        given = {"HF_ENDPOINT": server.address, "HF_TOKEN": "hf_mine", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = python("-m", "align_ext.cli", "train", *TINY, "--output", "out", "--push-to-hub", cwd=tmp_path,
                         env=given)  # fmt: skip
        text, _ = command.communicate(timeout=120)
    assert command.returncode == 0, text
    assert server.files == {"me/out": contents(tmp_path / "out/adapter")}
