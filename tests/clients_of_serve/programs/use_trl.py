"""TRL's ServerDistillationTrainer takes steps on a teacher behind a server, and on the same teacher in memory."""

import json
import math
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer
from trl.generation import vllm_client

STEPS = 6
# The client only sends requests to a server, and yet wants vLLM itself installed beside it.
vllm_client.is_vllm_available = lambda: True


class LocalTeacher:
    """The client's `get_sequence_logprobs` by a forward pass of the teacher's weights."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def get_sequence_logprobs(self, sequences, prompt_lengths, top_logprobs, temperature):
        found = {"logprobs": [], "logprob_token_ids": [], "actual_logprobs": [], "actual_token_ids": []}
        for ids, start in zip(sequences, prompt_lengths, strict=True):
            logp = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)[start - 1 : -1]
            top = logp.topk(top_logprobs)
            actual = torch.tensor(ids[start:])[:, None]
            found["logprobs"].append(top.values.tolist())
            found["logprob_token_ids"].append(top.indices.tolist())
            found["actual_logprobs"].append(logp.gather(1, actual).tolist())
            found["actual_token_ids"].append(actual.tolist())
        return found


def train(arguments: dict, beta: float, k: int, *, local: bool) -> list[float]:
    set_seed(5)
    tokenizer = AutoTokenizer.from_pretrained(arguments["student"])
    prompts = [[{"role": "user", "content": f"def method_{index}(self):"}] for index in range(8)]
    config = ServerDistillationConfig(
        output_dir="out", max_steps=STEPS, per_device_train_batch_size=2, logging_steps=1, report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, learning_rate=1e-3, max_completion_length=12,
        save_strategy="no", disable_tqdm=True, seed=5, beta=beta, loss_top_k=k,
        teacher_model_server_url=arguments["url"],
    )  # fmt: skip
    trainer = ServerDistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(arguments["student"], dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    if local:
        trainer.teacher_client = LocalTeacher(arguments["teacher"])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    arguments = json.loads(sys.argv[1])
    found = {
        name: [train(arguments, beta, k, local=local) for local in (False, True)]
        for name, beta, k in (("forward", 0.0, 8), ("mixed", 0.5, 1))
    }
    assert all(math.isfinite(loss) for runs in found.values() for losses in runs for loss in losses)
    print(json.dumps(found))


main()
