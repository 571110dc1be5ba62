"""An exported student is the student of the run: the same logits, tokenizer, template and ends, whoever loads it."""

import json
import warnings

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.engine.pieces import model_folder
from topkd.cli.app import app
from topkd.compose.export import export, is_hub_id
from topkd.engine.checkpoint.checkpoint import save_student
from topkd.engine.config.learner import LoRAConfig
from topkd.engine.loop.metrics import MetricsLog
from topkd.engine.models.student import Student
from topkd.engine.models.tokenizer import load_tokenizer
from topkd.topk.errors import ConfigError, TrainingError

IDS = torch.tensor([[5, 9, 30, 40, 50]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("export") / "base", seed=1)


def a_run(base, out, *, lora=None):
    """What a finished run leaves: a config, a run log, and a student that is no longer its base."""
    student = Student.load(str(base), "cpu", lora=None if lora is None else LoRAConfig(**lora))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weights in student.model.parameters():
            if weights.requires_grad:
                weights.add_(0.02 * torch.randn(weights.shape, generator=generator))
    save_student(student, load_tokenizer(str(base)), out / "student", {"version": 7})
    template = out / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}")
    values = {
        "student": {"model": str(base), "chat_template": str(template), **({"lora": lora} if lora else {})},
        "teacher": {"url": "http://127.0.0.1:1", "model": "big"},
        "data": {"path": "prompts.jsonl"},
        "rollout": {"stop_token_ids": [0]},
    }
    (out / "config.json").write_text(json.dumps(values))
    with MetricsLog(out / "metrics.jsonl") as log:
        for step, kl in ((0, 1.5), (7, 0.25)):
            log.write("eval", {"step": step, "reverse_kl": kl})
    with torch.inference_mode():
        return student.model(input_ids=IDS).logits


def test_a_full_model_reloads_with_its_logits_tokenizer_template_ends_and_card(base, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logits = a_run(base, tmp_path)
    done = export(tmp_path)
    assert done.path == tmp_path / "export"
    assert (done.kind, done.dtype) == ("model", "float32")
    again, tokenizer = AutoModelForCausalLM.from_pretrained(done.path), AutoTokenizer.from_pretrained(done.path)
    with torch.inference_mode():
        assert torch.equal(again(input_ids=IDS).logits, logits)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[user] hi"
    assert again.generation_config.eos_token_id == [tokenizer.eos_token_id, 0]
    card = (done.path / "README.md").read_text()
    for words in ("- base model: base\n", "from big", "weights of step 7", "| reverse_kl | 1.5 | 0.25 |", "topk_pg"):
        assert words in card
    assert "base_model:" not in card  # a folder of this machine is no model of the hub
    assert str(base) not in card


def test_the_card_names_the_served_model_the_hub_id_and_the_loss_that_trained_and_no_address(base, tmp_path):
    a_run(base, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["teacher"] = {"url": "http://10.0.0.7:8000"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = tmp_path / "student" / "topkd.json"
    custom = {"kind": "custom", "function": "losses.likelihood"}
    state.write_text(json.dumps({**json.loads(state.read_text()), "objective": custom}))
    card = (export(str(tmp_path), str(tmp_path / "first")).path / "README.md").read_text()
    assert "from a served model; float32" in card
    assert "- objective: kind custom, function losses.likelihood" in card
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.write("event", {"event": "start", "teachers": {"": {"model": "/srv/models/Big-70B"}}})
    card = (export(tmp_path, tmp_path / "second").path / "README.md").read_text()
    assert "from Big-70B; float32" in card
    assert "10.0.0.7" not in card
    assert is_hub_id("Qwen/Qwen3-0.6B")
    assert not any(is_hub_id(name) for name in ("models/a/b", "./student", "student"))
    assert not is_hub_id(str(base))


def test_bf16_halves_the_weights_and_moves_no_logit_far(base, tmp_path):
    from safetensors.torch import load_file

    logits = a_run(base, tmp_path)
    done = export(tmp_path, tmp_path / "small", dtype="bf16")
    weights = load_file(done.path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    small = Student.load(str(done.path), "cpu")
    with torch.inference_mode():
        moved = (small.model(input_ids=IDS).logits - logits).abs().max()
    assert 0 < float(moved) < 0.5


def test_an_adapter_is_written_alone_or_merged_and_both_are_the_student(base, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    logits = a_run(base, tmp_path, lora={"r": 4, "alpha": 8.0})
    alone = export(tmp_path, tmp_path / "adapter")
    whole = export(tmp_path, tmp_path / "merged", merge=True)
    assert (alone.kind, whole.kind) == ("adapter", "model")
    assert alone.parameters < whole.parameters / 2
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        onto = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.inference_mode():
        np.testing.assert_allclose(onto(input_ids=IDS).logits, logits, atol=1e-5)
        np.testing.assert_allclose(merged(input_ids=IDS).logits, logits, atol=1e-4)


def test_what_cannot_be_exported_is_one_line(base, tmp_path):
    a_run(base, tmp_path)
    for arguments, message in (
        ({"merge": True}, "no adapter to merge"),
        ({"dtype": "int3"}, "unknown dtype.*'int3'.*bf16"),
        ({"best": True}, r"no student to export \(.*student-best\).*eval.best"),
        ({"out": tmp_path / "student"}, "not empty"),
        ({"out": tmp_path / "config.json"}, "is a file"),
    ):
        with pytest.raises(ConfigError, match=message):
            export(tmp_path, **arguments)
    with pytest.raises(ConfigError, match=r"not a run's folder .*nowhere.*no such folder"):
        export(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"not a run's folder .*student.*no config.json and metrics.jsonl"):
        export(tmp_path / "student")


def test_a_folder_that_does_not_reload_as_its_student_is_not_there(base, tmp_path, monkeypatch):
    a_run(base, tmp_path)
    monkeypatch.setattr("topkd.compose.export._measure_difference", lambda *_: 1.0)
    with pytest.raises(TrainingError, match=r"does not reload.*differs by 1, expected at most 0.0001"):
        export(tmp_path, tmp_path / "made" / "model")
    assert not list((tmp_path / "made").iterdir())


def test_the_command_says_what_it_wrote(base, tmp_path):
    a_run(base, tmp_path)
    done = CliRunner().invoke(app, ["export", str(tmp_path), "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["path"] == str(tmp_path / "out")
    assert said["difference"] < 1e-4
