"""How a step is taken: rates, precision, recomputation, adapters; and what comes with the data."""

import copy
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.pieces import VOCAB, model_folder, topk_sample
from topkd.engine.config.learner import LearnerConfig, LoRAConfig
from topkd.engine.config.objectives import SFT, TAID, DirectGJS, TopKPolicyGradient
from topkd.engine.learner.learner import Learner
from topkd.engine.models.lora import merge_adapter
from topkd.engine.models.sampler import InProcessSampler
from topkd.engine.models.student import Precision, Student
from topkd.topk import SamplingParams
from topkd.topk.errors import ConfigError
from topkd.topk.samples import TextSample


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


def sample(seed=0, length=6, prompt=(3, 4)):
    rng = np.random.default_rng(seed)
    lists = [
        [
            (int(v), float(np.log(p)))
            for v, p in zip(rng.choice(VOCAB, 4, replace=False), rng.dirichlet(np.ones(6))[:4], strict=True)
        ]
        for _ in range(length)
    ]
    completion = rng.integers(1, VOCAB, length).tolist()
    drawn, behavior = -rng.uniform(0.5, 6, length), -rng.uniform(5, 6, length)
    actual = [dict(row).get(token, logp) for row, token, logp in zip(lists, completion, drawn, strict=True)]
    return topk_sample(prompt, completion, lists, actual, behavior)


def fresh(folder, **options):
    return Student.load(str(folder), "cpu", **options)


def gradients(student, samples, *, texts=(), objective=None, **config):
    learner = Learner(student, LearnerConfig(max_grad_norm=1e9, **config), objective or TopKPolicyGradient(), steps=10)
    seen = {}
    learner._optimizer.step = lambda: seen.update(
        {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}
    )
    return seen, learner.step(samples, texts)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ("cosine", [0.5, 1.0, 1.0, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 0.55, 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_the_rate_warms_up_and_falls_as_the_schedule_says(folder, schedule, expected):
    config = LearnerConfig(lr=1e-3, warmup_steps=2, schedule=schedule, final_lr_fraction=0.1)
    learner = Learner(fresh(folder), config, TopKPolicyGradient(), steps=6)
    assert [learner.step([sample(i)])["lr"] / 1e-3 for i in range(6)] == pytest.approx(expected)


def test_a_falling_rate_needs_an_end_and_room_to_fall(folder):
    student = fresh(folder)
    with pytest.raises(ConfigError, match="needs the number of steps"):
        Learner(student, LearnerConfig(schedule="cosine"), TopKPolicyGradient())
    with pytest.raises(ConfigError, match="must be shorter than the run"):
        Learner(student, LearnerConfig(schedule="linear", warmup_steps=9), TopKPolicyGradient(), steps=9)


def test_recomputing_activations_changes_no_gradient_and_leaves_sampling_its_cache(folder):
    plain, _ = gradients(fresh(folder), [sample(i) for i in range(3)])
    student = fresh(folder)
    calls = []
    student.backbone.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    again, _ = gradients(student, [sample(i) for i in range(3)], gradient_checkpointing=True)
    assert len(calls) == 2  # forward, and once more on the way back
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-6, atol=1e-8)
    assert not any(module.training for module in student.model.modules())
    drawn = InProcessSampler(student)._sample_batch([[3, 4]], 2, SamplingParams(max_tokens=5, seed=1), 0)
    wanted = InProcessSampler(fresh(folder))._sample_batch([[3, 4]], 2, SamplingParams(max_tokens=5, seed=1), 0)
    assert [r.completion_ids.tolist() for r in drawn[0]] == [r.completion_ids.tolist() for r in wanted[0]]


def test_autocast_runs_in_bfloat16_and_keeps_master_weights_and_the_head_in_float32(folder):
    student = fresh(folder)
    seen = {}
    student.backbone.layers[0].mlp.register_forward_hook(lambda *args: seen.update(dtype=args[2].dtype))
    exact, _ = gradients(fresh(folder), [sample(i) for i in range(3)])
    rounded, record = gradients(student, [sample(i) for i in range(3)], autocast="bfloat16")
    assert seen["dtype"] == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in student.model.parameters())
    assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
    difference = math.sqrt(sum(float((exact[n] - rounded[n]).square().sum()) for n in exact))
    size = math.sqrt(sum(float(exact[n].square().sum()) for n in exact))
    assert 0 < difference < 0.05 * size
    assert math.isfinite(record["loss"])


def test_the_head_outside_autocast_keeps_logprobs_that_sum_to_one(folder):
    student = fresh(folder)
    ids, mask, rows = torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.long), torch.arange(3)
    everything = torch.arange(VOCAB).expand(3, -1)
    with torch.no_grad():
        full = student.token_logprobs(ids, mask, rows, everything)
        outside = student.token_logprobs(ids, mask, rows, everything, Precision(torch.bfloat16))
        inside = student.token_logprobs(ids, mask, rows, everything, Precision(torch.bfloat16, head=True))
    torch.testing.assert_close(full.exp().sum(1), torch.ones(3))
    torch.testing.assert_close(outside.exp().sum(1), torch.ones(3), rtol=1e-5, atol=1e-5)
    assert (full - outside).abs().max() < (full - inside).abs().max()


def test_eight_bit_adam_is_refused_where_bitsandbytes_is_not_installed(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="needs bitsandbytes"):
        Learner(fresh(folder), LearnerConfig(optimizer="adamw_8bit"), TopKPolicyGradient())


def test_an_adapter_alone_trains_starts_as_no_change_and_merges_into_what_was_trained(folder, tmp_path):
    base, student = fresh(folder), fresh(folder, lora=LoRAConfig(r=4), seed=3)
    ids, mask, rows = torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.long), torch.arange(3)
    wanted = torch.arange(VOCAB).expand(3, -1)
    with torch.no_grad():
        torch.testing.assert_close(
            student.token_logprobs(ids, mask, rows, wanted), base.token_logprobs(ids, mask, rows, wanted)
        )
    assert all("lora_" in name for name in student.trained())
    again = fresh(folder, lora=LoRAConfig(r=4), seed=3)
    assert all(torch.equal(p, again.trained()[name]) for name, p in student.trained().items())
    frozen = {n: p.clone() for n, p in student.model.named_parameters() if not p.requires_grad}
    learner = Learner(student, LearnerConfig(), DirectGJS())
    records = [learner.step([sample(0)]) for _ in range(20)]
    assert records[-1]["lr"] == 1e-4
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(torch.equal(value, student.model.get_parameter(name)) for name, value in frozen.items())
    with torch.no_grad():
        trained = student.token_logprobs(ids, mask, rows, wanted)
    merge_adapter(student.model).save_pretrained(tmp_path / "whole")
    whole = Student.load(str(tmp_path / "whole"), "cpu")
    with torch.no_grad():
        torch.testing.assert_close(whole.token_logprobs(ids, mask, rows, wanted), trained, rtol=1e-4, atol=1e-4)
    assert not (trained - base.token_logprobs(ids, mask, rows, wanted)).abs().max() < 1e-4


@pytest.mark.parametrize("how", [{"modules_to_save": ("lm_head",)}, {"target_modules": ("q_proj", "lm_head")}], ids=str)
def test_a_head_that_trains_with_the_adapter_gets_its_gradient(folder, tmp_path, how):
    model = AutoModelForCausalLM.from_pretrained(folder)
    untied = tmp_path / "untied"
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(untied)
    student = Student.load(str(untied), "cpu", lora=LoRAConfig(r=4, **({"target_modules": ("q_proj",)} | how)))
    assert student.vocab_size == VOCAB
    got, _ = gradients(student, [sample(0)])
    for parameter in student.model.parameters():
        parameter.grad = None
    data = sample(0).core
    ids = torch.tensor(data.full_ids.astype(np.int64))[None, :-1]
    rows = torch.arange(1, 7)
    chosen = torch.tensor(data.completion_ids.astype(np.int64))[:, None]
    fused = student.token_logprobs(ids, torch.ones_like(ids), rows, chosen)
    whole = torch.log_softmax(student.model(input_ids=ids).logits[0, rows].float(), -1).gather(1, chosen)
    torch.testing.assert_close(fused, whole, rtol=1e-5, atol=1e-5)
    head = [name for name in got if "lm_head" in name]
    assert head
    torch.autograd.backward(fused.sum())
    first = {name: student.model.get_parameter(name).grad.clone() for name in head}
    student.model.zero_grad()
    torch.autograd.backward(whole.sum())
    for name in head:
        torch.testing.assert_close(first[name], student.model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_an_adapter_on_a_tied_head_or_on_nothing_is_refused(tmp_path, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    if not model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(folder := tmp_path / "tied")
    with pytest.raises(ConfigError, match="ties to its embedding"):
        fresh(folder, lora=LoRAConfig(modules_to_save=("lm_head",)))
    with pytest.raises(ConfigError, match="does not fit this model"):
        fresh(folder, lora=LoRAConfig(target_modules=("no_such_layer",)))


def test_texts_train_by_cross_entropy_in_the_same_mean(folder):
    scored, text = sample(0), TextSample(sample(1, length=4).core)
    alone, _ = gradients(fresh(folder), [scored])
    got, record = gradients(fresh(folder), [scored], texts=[text])
    student = fresh(folder)
    ids = torch.tensor(text.core.full_ids.astype(np.int64))[None]
    logp = torch.log_softmax(student.model(input_ids=ids[:, :-1]).logits[0].double(), -1)[1:]
    own = -logp.gather(1, ids[0, 2:, None]).sum()
    (own / 10).backward()
    for name, parameter in student.model.named_parameters():
        wanted = alone[name] * 6 / 10 + parameter.grad
        torch.testing.assert_close(got[name], wanted, rtol=1e-4, atol=1e-6)
    assert (record["tokens"], record["sft_tokens"]) == (10, 4)
    assert record["sft_loss"] == pytest.approx(float(own.detach()) / 4, rel=1e-5)


def test_sft_alone_raises_the_likelihood_of_the_data(folder):
    learner = Learner(fresh(folder), LearnerConfig(lr=1e-3), SFT())
    losses = [learner.step([], [TextSample(sample(1).core)])["sft_loss"] for _ in range(15)]
    assert losses[-1] < losses[0] - 0.5


def test_taids_schedule_moves_once_a_step_and_survives_a_checkpoint(folder):
    config = LearnerConfig(lr=1e-3)
    learner = Learner(fresh(folder), config, TAID(t_start=0.2), steps=6)
    t = [learner.step([sample(0)])["taid_t"] for _ in range(3)]
    assert t[0] == pytest.approx(0.2)
    assert t[0] <= t[1] < t[2]
    state = copy.deepcopy(learner.state_dict())
    student = fresh(folder)
    student.model.load_state_dict(learner.student.model.state_dict())
    other = Learner(student, config, TAID(t_start=0.2), steps=6)
    other.load_state_dict(state)
    assert other.step([sample(1)]) == learner.step([sample(1)])
    with pytest.raises(ConfigError, match="taid needs the number of steps"):
        Learner(fresh(folder), config, TAID())


def test_a_step_of_the_datas_completions_alone_leaves_taids_schedule_where_it_was(folder):
    learner = Learner(fresh(folder), LearnerConfig(lr=1e-3), TAID(t_start=0.2), steps=6)
    learner.step([sample(0)])
    before = learner.state_dict().values["objective"]["taid"]
    record = learner.step([], [TextSample(sample(1).core)])
    assert record["skipped"] == ""
    assert learner.state_dict().values["objective"]["taid"] == before, "no loss of the objective is not a loss of 0"


def test_the_run_log_knows_how_probable_the_end_of_text_is(folder):
    student = fresh(folder)
    learner = Learner(student, LearnerConfig(lr=1e-9), TopKPolicyGradient(), stop_ids=[7, 9])
    record = learner.step([sample(0)])
    ids = torch.tensor(sample(0).core.full_ids.astype(np.int64))[None, :-1]
    p = torch.softmax(student.model(input_ids=ids).logits[0, 1:], -1).detach()
    assert record["eos_probability"] == pytest.approx(float(p[:, [7, 9]].sum(1).mean()), rel=1e-4)


def test_inner_steps_keep_the_rollouts_own_logprobs_and_every_one_is_in_the_record(folder):
    """The third step's ratios are s_3 / behaviour: not one, and not against the step before."""
    config = LearnerConfig(lr=1e-3, warmup_steps=0, inner_steps=3)
    student, one = fresh(folder), sample(0)
    record = Learner(student, config, TopKPolicyGradient()).step([one])
    again = fresh(folder)
    learner = Learner(again, config.model_copy(update={"inner_steps": 1}), TopKPolicyGradient())
    singles = [learner.step([one]) for _ in range(3)]
    for name, value in student.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    for name in ("loss", "grad_norm", "kl_k1", "ratio_mean", "ess", "behavior_kl_k3", "effective_coefficient"):
        values = [single[name] for single in singles]
        assert record[name] == pytest.approx(sum(values) / 3, rel=1e-9)
        assert len(set(values)) == 3, name
    assert record["ratio_max"] == max(single["ratio_max"] for single in singles)
    assert record["ratio_hist"] == np.sum([single["ratio_hist"] for single in singles], axis=0).tolist()
    assert sum(record["ratio_hist"]) == 3 * record["tokens"]
    assert record["mismatch_kl"] == singles[0]["behavior_kl_k3"], "of the weights before any of them"
    assert (record["passes"], record["skipped_passes"], record["skipped"]) == (3, 0, "")
    assert "passes" not in singles[0]


@pytest.mark.parametrize("good", [0, 2])
def test_an_inner_step_that_is_not_finite_is_counted_and_what_was_taken_before_it_is_not_called_skipped(folder, good):
    config = LearnerConfig(lr=1e-3, warmup_steps=0, inner_steps=4)
    student, one = fresh(folder), sample(0)
    learner = Learner(student, config, TopKPolicyGradient())
    reference = fresh(folder)
    fewer = Learner(reference, config.model_copy(update={"inner_steps": max(good, 1)}), TopKPolicyGradient())
    real, calls = learner._model.score, []

    def score(batch, ids):
        calls.append(1)
        return real(batch, ids) * (math.nan if len(calls) > good else 1.0)

    learner._model.score = score
    record = learner.step([one])
    assert len(calls) == good + 1, "the same batch from the same weights would not be finite either"
    assert (record["passes"], record["skipped_passes"]) == (good, 4 - good)
    assert record["skipped"] == ("" if good else "non-finite gradient")
    assert math.isfinite(record["loss"]) == (good > 0)
    if good:
        want = fewer.step([one])
        assert {name: record[name] for name in ("loss", "ess", "kl_k1")} == {
            name: want[name] for name in ("loss", "ess", "kl_k1")
        }
    for name, value in student.model.state_dict().items():
        assert torch.equal(value, reference.model.state_dict()[name])


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"dtype": "bfloat16", "lora": LoRAConfig(r=4)}, {}),
        ({"dtype": "bfloat16", "lora": LoRAConfig(r=4)}, {"autocast": "bfloat16", "gradient_checkpointing": True}),
        ({"lora": LoRAConfig(r=4)}, {"autocast": "bfloat16", "autocast_head": True, "gradient_checkpointing": True}),
        ({"dtype": "bfloat16"}, {}),
    ],
    ids=str,
)
def test_adapters_dtypes_precision_and_recomputation_combine(folder, options, config):
    student = fresh(folder, **options)
    learner = Learner(student, LearnerConfig(lr=1e-2, warmup_steps=0, **config), DirectGJS())
    losses = [learner.step([sample(0), sample(1)])["loss"] for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    (rollouts,) = InProcessSampler(student)._sample_batch([[3, 4]], 1, SamplingParams(max_tokens=3, seed=1), 0)
    assert np.isfinite(rollouts[0].logp).all()
    if "lora" in options:  # what trains is in float32, whatever the frozen weights are
        assert {p.dtype for p in student.trained().values()} == {torch.float32}
