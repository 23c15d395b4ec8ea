"""Parameters that several processes hold parts of: what they save is loaded by one to the bit, or they are refused."""

import pytest
import torch
from hf import shards
from hf.folders import assert_same_bits, files, logits, plain
from peft import PeftModel
from processes import spawn
from safetensors.torch import load_file

from align_ext import load_adapter, save_adapter, set_task
from align_ext.base_model import sharded
from align_ext.base_model.fingerprint import BaseModel, OtherBaseError
from align_ext.io.adapter_folder import AdapterFolder
from align_ext.io.peft_format import WEIGHTS
from align_ext.system.tensors import read_tensors


def assert_holds(folder, kind):
    """The folder's adapter, loaded into the base by one process, is what was trained; and so is what PEFT reads."""
    expected = load_file(folder / "expected.safetensors")
    loaded = load_adapter(shards.base_of(kind), folder / "adapter")
    found = {name: p for name, p in loaded.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    fresh = dict(shards.model_of(kind).named_parameters())
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), (kind, name)
        assert not torch.equal(tensor, fresh[name]), (kind, name)
    if (folder / "peft").exists():
        set_task(loaded, 1)
        for read in (load_adapter, PeftModel.from_pretrained):
            torch.testing.assert_close(
                logits(read(shards.base_of(kind), folder / "peft")), logits(loaded), rtol=1e-5, atol=1e-5
            )


def assert_knows_its_base(folder):
    """The folder's record holds what the one of a whole model holds, and a base with another weight is refused."""
    recorded, full_values = AdapterFolder.read(folder).base, BaseModel.of(plain())
    assert recorded.weights.keys() == full_values.weights.keys() - {"model.norm.weight", "model.embed_tokens.weight"}
    other = plain()
    with torch.no_grad():
        other.model.layers[1].self_attn.o_proj.weight.mul_(1.1)
    with pytest.raises(OtherBaseError, match=r"self_attn\.o_proj\.weight' has other values"):
        load_adapter(other, folder)


def test_fsdp2_saves_and_loads_what_it_trained(tmp_path, unused_port):
    spawn(shards.fsdp2, unused_port, str(tmp_path))
    for kind in (*shards.KINDS, "tied"):
        assert_holds(tmp_path / kind, kind)
    assert_knows_its_base(tmp_path / shards.KINDS[0] / "adapter")
    assert not [name for name in files(tmp_path) if ".tmp" in name]


@pytest.mark.slow
def test_fsdp2_saves_and_loads_what_is_trained_beside_linear_layers(tmp_path, unused_port):
    spawn(shards.fsdp2_beside, unused_port, str(tmp_path))
    for kind in (*shards.BESIDE, *shards.DORA):
        assert_holds(tmp_path / kind, kind)


@pytest.mark.slow  # test_sharded_trainers saves by ZeRO-3, too
def test_zero3_saves_what_it_trained(tmp_path, unused_port):
    kinds = ("lora", "m_lora, rslora")
    spawn(shards.zero3, unused_port, str(tmp_path), kinds)
    for kind in kinds:
        assert_holds(tmp_path / kind, kind)
        assert_knows_its_base(tmp_path / kind / "adapter")


@pytest.mark.slow
def test_zero3_saves_what_is_trained_beside_linear_layers(tmp_path, unused_port):
    spawn(shards.zero3, unused_port, str(tmp_path), tuple(shards.BESIDE))
    for kind in shards.BESIDE:
        assert_holds(tmp_path / kind, kind)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_names_are_those_of_the_model_inside_its_wrappers(wrap, tmp_path):
    model = shards.trained("lora")
    save_adapter(model, tmp_path / "plain")
    save_adapter(wrap(model), tmp_path / "wrapped")
    for layer in model.model.layers:
        layer.mlp.up_proj = torch.compile(layer.mlp.up_proj)
    save_adapter(model, tmp_path / "compiled parts")
    tensors, record = read_tensors(tmp_path / "plain" / WEIGHTS)
    for folder in ("wrapped", "compiled parts"):
        assert files(tmp_path / folder) == files(tmp_path / "plain")
        for name in files(tmp_path / "plain"):
            if name.endswith(".json"):
                assert (tmp_path / folder / name).read_text() == (tmp_path / "plain" / name).read_text()
        found, its_record = read_tensors(tmp_path / folder / WEIGHTS)
        assert its_record == record
        assert_same_bits(found, tensors)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.adapter.lora_A.zero_()
    assert load_adapter(wrap(model), tmp_path / "plain") is not None
    assert model.model.layers[0].mlp.down_proj.adapter.lora_A.abs().sum() > 0


def test_a_model_without_values_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is on the meta device, where it has no values"):
        save_adapter(shards.trained("lora").to("meta"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_whole_tensors_need_no_other_process():
    tensors = {"a": torch.ones(2)}
    assert sharded.shard_ranks(tensors.values()) == ()
    assert sharded.full_values(tensors, "test")["a"].tolist() == [1, 1]
