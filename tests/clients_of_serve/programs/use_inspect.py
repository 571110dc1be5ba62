"""inspect-ai evaluates a model on an OpenAI-compatible server; prints the log's outcome."""

import json
import os
import sys

from inspect_ai import Task
from inspect_ai import eval as evaluate
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes
from inspect_ai.solver import generate


def main() -> None:
    arguments = json.loads(sys.argv[1])
    os.environ["TOPKD_API_KEY"], os.environ["TOPKD_BASE_URL"] = arguments["key"], f"{arguments['url']}/v1"
    samples = [Sample(input=f"def method_{index}(self):", target="zzz", id=index) for index in range(3)]
    config = GenerateConfig(temperature=0.0, max_tokens=8, seed=1, logprobs=True, top_logprobs=2)
    task = Task(dataset=samples, solver=[generate()], scorer=includes())
    [log] = evaluate(
        task,
        model=f"openai-api/topkd/{arguments['model']}",
        display="none",
        log_dir="logs",
        **config.model_dump(exclude_none=True),
    )
    found = {
        "status": log.status,
        "error": None if log.error is None else log.error.message,
        "outputs": [sample.output.completion for sample in log.samples or []],
        "reasons": [sample.output.stop_reason for sample in log.samples or []],
        "logprobs": [
            [entry.logprob for entry in sample.output.choices[0].logprobs.content] for sample in log.samples or []
        ],
        "usage": [usage.output_tokens for usage in log.stats.model_usage.values()],
        "accuracy": log.results.scores[0].metrics["accuracy"].value if log.results else None,
    }
    print(json.dumps(found))


main()
