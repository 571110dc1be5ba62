"""Micro-batches: within the budget, every sample once, alike in length, rows where the tokens are."""

import numpy as np
import torch

from tests.engine.pieces import scalar_sample
from topkd.engine.learner.batching import make_micro_batches

CPU = torch.device("cpu")


def samples(seed=0, count=40):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        prompt, length = [i + 1] * int(rng.integers(1, 6)), int(rng.integers(1, 40))
        made.append(scalar_sample(prompt, rng.integers(1, 300, length), -np.ones(length), -np.ones(length)))
    return made


def batches(chosen, budget):
    return list(make_micro_batches(chosen, [sample.core.mask for sample in chosen], budget, CPU))


def test_every_sample_is_in_one_batch_within_the_budget():
    chosen = samples()
    made = batches(chosen, 200)
    assert sorted(id(sample) for batch in made for sample in batch.samples) == sorted(map(id, chosen))
    assert all(batch.input_ids.numel() <= 200 for batch in made)
    assert sum(batch.tokens for batch in made) == sum(sample.core.completion_len for sample in chosen)


def test_samples_of_similar_length_share_a_batch_so_that_little_is_padding():
    chosen = samples()
    made = batches(chosen, 200)
    used = sum(sample.core.input_ids.size for sample in chosen)
    padding = sum(batch.input_ids.numel() for batch in made) - used
    as_they_come = [chosen[i : i + 4] for i in range(0, len(chosen), 4)]
    naive = sum(len(part) * max(sample.core.input_ids.size for sample in part) for part in as_they_come) - used
    assert padding < 0.5 * naive
    longest = [batch.input_ids.shape[1] for batch in made]
    assert longest == sorted(longest)


def test_a_sample_longer_than_the_budget_goes_alone():
    made = batches(samples(), 8)
    assert all(len(batch.samples) == 1 for batch in made if batch.input_ids.numel() > 8)


def test_rows_predict_their_targets_and_nothing_trains_on_padding():
    for batch in batches(samples(1), 120):
        flat = batch.attention_mask.reshape(-1)
        assert bool((flat[batch.rows] == 1).all())
        wanted = np.concatenate(
            [s.core.completion_ids[pick] for s, pick in zip(batch.samples, batch.picks, strict=True)]
        )
        assert batch.targets.tolist() == wanted.tolist()
        inside = batch.input_ids.reshape(-1)[batch.rows]
        before = np.concatenate(
            [s.core.full_ids[s.core.prompt_len - 1 + pick] for s, pick in zip(batch.samples, batch.picks, strict=True)]
        )
        assert inside.tolist() == before.tolist()


def test_samples_without_a_trained_token_are_left_out():
    chosen = samples(count=5)
    masks = [sample.core.mask & (i % 2 == 0) for i, sample in enumerate(chosen)]
    made = list(make_micro_batches(chosen, masks, 1000, CPU))
    assert {id(sample) for batch in made for sample in batch.samples} == {id(chosen[i]) for i in (0, 2, 4)}
