"""lm-eval's `local-completions` against a server, and its `hf` back end over the same weights; prints both."""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

TASK = """
task: four_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """
task: perplexity
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: question
metric_list:
  - metric: bits_per_byte
"""
GREEDY = """
task: greedy
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: generate_until
test_split: test
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
"""


def make_tasks(folder: Path) -> TaskManager:
    rows = [
        {"question": f"def method_{index}(self, key):\n    return", "choices": [" self", " key", " None", " index é"]}
        for index in range(6)
    ]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps({**row, "answer": index % 4}) for index, row in enumerate(rows)))
    for name, text in (("four", TASK), ("rolling", ROLLING), ("greedy", GREEDY)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(tasks: TaskManager, model: str, arguments: dict) -> dict:
    names = ["four_choices", "perplexity", "greedy"]
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=names, task_manager=tasks, batch_size=1, bootstrap_iters=0
    )
    return {
        name: [sample["filtered_resps"] for sample in sorted(found["samples"][name], key=lambda s: s["doc_id"])]
        for name in names
    } | {"acc": found["results"]["four_choices"]["acc,none"]}


def main() -> None:
    arguments = json.loads(sys.argv[1])
    folder = Path("tasks")
    folder.mkdir()
    tasks = make_tasks(folder.resolve())
    served = {
        "model": arguments["model"],
        "base_url": f"{arguments['url']}/v1/completions",
        "tokenizer": arguments["folder"],
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "num_concurrent": 4,
        "max_retries": 1,
        "max_length": 512,
    }
    local = {"pretrained": arguments["folder"], "dtype": "float32", "device": "cpu", "max_length": 512}
    found = {"served": evaluate(tasks, "local-completions", served), "local": evaluate(tasks, "hf", local)}
    print(json.dumps(found))


main()
