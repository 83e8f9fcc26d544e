from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lightning_sft.export.convert import export_checkpoint
from lightning_sft.export.gguf_file import write_gguf
from lightning_sft.model.pretrained import load_tokenizer
from lightning_sft.types import InputError
from tests.helpers.exporting import trained

CONVERTER = os.environ.get("LLAMA_CPP", "") + "/convert_hf_to_gguf.py"


def test_a_converter_that_is_missing_or_fails_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no converter 'nowhere.py'"):
        write_gguf(tmp_path, "nowhere.py", "f16")
    (tmp_path / "broken.py").write_text("raise SystemExit('unknown pre-tokenizer')")
    with pytest.raises(InputError, match=r"could not convert the model:\nunknown pre-tokenizer"):
        write_gguf(tmp_path, str(tmp_path / "broken.py"), "f16")
    (tmp_path / "idle.py").write_text("")
    with pytest.raises(InputError, match="could not convert the model"):
        write_gguf(tmp_path, str(tmp_path / "idle.py"), "f16")


def test_a_model_that_passed_its_comparison_is_kept_where_its_conversion_fails(pretrained: str, tmp_path: Path) -> None:
    trained(pretrained, max_steps=1).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="There is no converter"):  # before anything is loaded
        export_checkpoint(tmp_path / "a.ckpt", tmp_path / "out", gguf_converter="nowhere.py")
    (tmp_path / "broken.py").write_text("raise SystemExit('No module named sentencepiece')")
    kept = tmp_path / "out.failed"
    with pytest.raises(InputError, match=rf"No module named sentencepiece\n.* passed its comparison; it is in {kept}"):
        export_checkpoint(tmp_path / "a.ckpt", tmp_path / "out", gguf_converter=tmp_path / "broken.py")
    assert json.loads((kept / "parity.json").read_text())["passed"]
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in kept.iterdir()}
    assert not (tmp_path / "out").exists()


def test_the_chat_template_of_a_gguf_file_is_found(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", "</s>"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert load_tokenizer(path).chat_template == template


@pytest.mark.slow
@pytest.mark.skipif(not Path(CONVERTER).is_file(), reason="LLAMA_CPP is no checkout of llama.cpp")
@pytest.mark.parametrize("out_type", ["f32", "f16", "q8_0"])
def test_a_gguf_file_has_the_model_that_was_trained(out_type: str, tmp_path: Path) -> None:
    from lightning_sft.demos.pretrained import fetch_demo_model

    trained(str(fetch_demo_model()), max_steps=1).save_checkpoint(tmp_path / "a.ckpt")
    settings = {"gguf_converter": CONVERTER, "gguf_type": out_type}
    out = export_checkpoint(str(tmp_path / "a.ckpt"), str(tmp_path / "out"), **settings)
    found = json.loads((out / "parity.json").read_text())["models"][-1]
    assert found["name"] == f"GGUF, {out_type}"
    assert found["mean_kl"] < {"f32": 1e-6}.get(out_type, 1e-2)
