"""align-lora doctor --grad-check: a table of modes, and an exit code that tells whether every layer is reached."""

import io

import pytest
from hf.words import model_folder
from rich.console import Console

from align_ext.cli import check_modes
from align_ext.losses.kl import KlAlignment


def checked(name=None):
    out = io.StringIO()
    return check_modes.check_modes(name, Console(file=out, width=120)), out.getvalue()


def only(monkeypatch, *architectures):
    monkeypatch.setattr(
        check_modes, "_tiny_models", lambda: {name: check_modes._tiny_model_maker(name) for name in architectures}
    )


def test_the_tiny_models_of_all_architectures_are_there():
    from align_ext.architectures import ARCHITECTURES

    assert set(check_modes._tiny_models()) == set(ARCHITECTURES)


def test_a_table_has_a_row_for_each_mode_and_loss(monkeypatch):
    only(monkeypatch, "mtlora")
    healthy, text = checked()
    assert healthy
    for mode in ("no checkpointing", "non-reentrant", "reentrant"):
        for loss in ("align", "balance"):
            assert any(
                f"mtlora, {mode} " in line and f" {loss} " in line and "2/2" in line for line in text.split("\n")
            )


def test_an_alignment_without_a_gradient_is_told_layer_by_layer(monkeypatch):
    right = KlAlignment.gradients
    monkeypatch.setattr(KlAlignment, "gradients", lambda *args: {k: 0 * dz for k, dz in right(*args).items()})
    only(monkeypatch, "align_lora")
    healthy, text = checked()
    assert not healthy
    assert "0/6" in text
    assert "model.layers.1.mlp.up_proj: align: none: backward reached the layer, but not" in " ".join(text.split())


def test_a_model_folder_is_checked_in_every_mode(tmp_path):
    healthy, text = checked(str(model_folder(tmp_path / "model")))
    assert healthy
    assert text.count("6/6") == 3


@pytest.mark.parametrize("healthy", [True, False])
def test_the_exit_code_is_the_verdict(run, healthy, monkeypatch):
    monkeypatch.setattr(check_modes, "check_modes", lambda name, console: healthy)
    assert run("doctor", "--grad-check")[0] == (0 if healthy else 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor", "--model", "x"], "--model goes with --grad-check"),
        (["doctor", "--grad-check", "--model", "/absent"], "no model folder '/absent'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
