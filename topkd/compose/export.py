"""``export``: write a run's student as a model folder with tokenizer, template, generation config and model card."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import topkd
from topkd.compose.config.run_config import RunConfig, validate_config
from topkd.compose.data.chat_templates import Side
from topkd.compose.preflight.lengths import list_stop_ids
from topkd.engine.checkpoint.snapshots import write_folder
from topkd.engine.loop.metrics import read_metrics
from topkd.report.load.run_folder import CONFIG, RUN_LOG, STUDENT
from topkd.topk.errors import ConfigError, TrainingError

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[str, DType] = {"fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16",
                            "fp16": "float16", "float16": "float16"}  # fmt: skip
# Largest difference allowed between a logit of the student and the same logit of the written folder.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True, slots=True)
class Exported:
    """The folder that was written, and the result of its check.

    Attributes:
        path: The folder.
        kind: "model", or "adapter" for a LoRA adapter without its base model.
        dtype: Dtype of the weights.
        parameters: Number of parameters in the folder.
        difference: Largest difference of a logit between the run's student and the folder as transformers reloads it.
    """

    path: Path
    kind: Literal["model", "adapter"]
    dtype: str
    parameters: int
    difference: float


def export(
    run: str | Path, out: str | Path | None = None, *, merge: bool = False, dtype: str | None = None, best: bool = False
) -> Exported:
    """Write the student of a run as a model folder, and check that the folder reloads as the same model.

    Args:
        run: The run's folder.
        out: Folder to write, new or empty; None takes ``RUN/export``.
        merge: Whether to merge a LoRA adapter into its base model. Otherwise only the adapter is written.
        dtype: Dtype of the written weights, such as "bf16"; None takes ``student.dtype`` of the run.
        best: Whether to write the best student by the run's ``eval.best`` instead of the last one.
    """
    run = Path(run)
    config = _read_config(run)
    source = _find_source(run, best=best)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError("unknown dtype", got=repr(dtype), expected=", ".join(sorted(set(DTYPES))))
    out = run / "export" if out is None else Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "the folder to export to is not empty" if out.is_dir() else "the folder to export to is a file"
        raise ConfigError(what, where=str(out), hint="choose another --out")
    adapter = (source / "adapter_config.json").exists()
    if merge and not adapter:
        raise ConfigError("there is no adapter to merge", where=str(source), hint="leave --merge out")
    wanted = DTYPES[dtype] if dtype is not None else config.student.dtype
    model = _open_model(source, config, wanted, adapter=adapter)
    if merge:
        model = model.merge_and_unload()
    alone = adapter and not merge
    tokenizer = _load_tokenizer(source, config)
    _write_generation_config(model, tokenizer, config)
    found: dict[str, float] = {}

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(
            _write_card(run, source, config, adapter=alone, dtype=wanted), encoding="utf-8"
        )
        again = _open_model(folder, config, wanted, adapter=alone)
        found["difference"] = difference = _measure_difference(model, again, tokenizer)
        if difference > _TOLERANCE[wanted]:
            shutil.rmtree(folder)
            raise TrainingError(
                "the exported folder does not reload as the model that was written", where=str(out),
                got=f"a logit differs by {difference:.3g}", expected=f"at most {_TOLERANCE[wanted]:g} in {wanted}",
            )  # fmt: skip
        weights = [weight for name, weight in again.named_parameters() if not alone or "lora_" in name]
        found["parameters"] = sum(weight.numel() for weight in weights)

    write_folder(out if out.name else out.absolute(), fill)
    return Exported(out, "adapter" if alone else "model", wanted, int(found["parameters"]), found["difference"])


def _find_source(run: Path, *, best: bool) -> Path:
    source = run / ("student-best" if best else STUDENT)
    if not source.exists():
        hint = "the run has no eval.best" if best else "the run has not ended: let it end, or resume it"
        raise ConfigError("no student to export", where=str(source), hint=hint)
    return source


def _read_config(run: Path) -> RunConfig:
    place = run / CONFIG
    try:
        values: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = {}
    if not values or not (run / RUN_LOG).exists():
        got = f"no {CONFIG} and {RUN_LOG} to read" if run.exists() else "no such folder"
        raise ConfigError("not a run's folder", where=str(run), got=got, hint="give the --out of a run")
    if "student" not in values:
        raise ConfigError("a run that names no student model cannot be exported", where=str(run), hint="copy student/")
    return validate_config(
        RunConfig, {key: value for key, value in values.items() if value is not None}, where=str(place)
    )


def _open_model(folder: Path, config: RunConfig, dtype: str, *, adapter: bool) -> Any:
    from topkd.engine.models.student import load_causal_lm

    if not adapter:
        return load_causal_lm(str(folder), dtype).eval()  # type: ignore[arg-type]
    import peft

    base = load_causal_lm(config.student.model, dtype)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        # peft uses a name that transformers 5 deprecates; the user cannot change that
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return peft.PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False).eval()


def _load_tokenizer(source: Path, config: RunConfig) -> Any:
    from topkd.engine.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(source))
    own = Side.of(tokenizer, config.student.chat_template, {}).chat_template
    if own is not None:
        tokenizer.chat_template = own
    return tokenizer


def _write_generation_config(model: Any, tokenizer: Any, config: RunConfig) -> None:
    """Set the stop ids that the student was trained with in the generation config."""
    ends = list_stop_ids(tokenizer, config.rollout.stop_token_ids)
    settings = getattr(model, "generation_config", None)
    if settings is not None and ends:
        settings.eos_token_id = ends[0] if len(ends) == 1 else list(ends)


def _measure_difference(written: Any, again: Any, tokenizer: Any) -> float:
    import torch

    ids = tokenizer("The quick brown fox. def f(x): return 1")["input_ids"][:32]
    batch = torch.tensor([ids or [0]])
    with torch.inference_mode():
        logits = [model(input_ids=batch.to(model.device)).logits.float().cpu() for model in (written, again)]
    return float((logits[0] - logits[1]).abs().max())


def _write_card(run: Path, source: Path, config: RunConfig, *, adapter: bool, dtype: str) -> str:
    base = config.student.model
    state = json.loads((source / "topkd.json").read_text(encoding="utf-8"))
    settings = state.get("objective") or config.objective.model_dump()  # a custom loss is known by its name
    objective = ", ".join(f"{key} {value}" for key, value in settings.items())
    rate, rollout = config.learner.learning_rate(lora=config.student.lora is not None), config.rollout
    origin = f"Distilled with topkd {topkd.__version__} from {' and '.join(_list_teachers(run, config)) or 'its data'}"
    work = f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} completions"
    lines = [
        "---", f"library_name: {'peft' if adapter else 'transformers'}", "pipeline_tag: text-generation",
        *([f"base_model: {base}"] if is_hub_id(base) else []), "tags: [distillation, topkd]", "---", "",
        f"# {Path(base).name}, distilled", "",
        f"{origin}; {dtype} weights of step {state.get('version', '?')}.", "",
        f"- base model: {_shorten_path(base)}", f"- objective: {objective}", f"- learning rate: {rate}",
        f"- steps: {config.steps}, {work} of at most {rollout.max_completion_tokens} tokens, seed {config.seed}",
        f"- prompts: {Path(config.data.path).name}", "", *_list_measurements(run),
    ]  # fmt: skip
    if adapter:
        lines += ["Load it with `peft.PeftModel.from_pretrained(base, folder)` on the base model named above.", ""]
    else:
        lines += ["Load it with `transformers.AutoModelForCausalLM.from_pretrained(folder)`.", ""]
    return "\n".join(lines)


def _list_teachers(run: Path, config: RunConfig) -> list[str]:
    """List the teachers' models, as the run log has them; never a server's address."""
    logged: dict[str, Any] = next(
        (event["teachers"] for event in read_metrics(run / RUN_LOG, "event") if "teachers" in event), {}
    )
    names = {
        logged.get(name, {}).get("model") or teacher.model or ("itself" if teacher.kind == "self" else "a served model")
        for name, teacher in config.teacher_map().items()
    }
    return sorted(_shorten_path(name) for name in names)


def is_hub_id(model: str) -> bool:
    """Whether a model's name is ORGANISATION/NAME on a model hub, not a folder of this machine."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) is not None and not Path(model).exists()


def _shorten_path(model: str) -> str:
    """Return a hub id unchanged, and only the last part of a path."""
    return model if is_hub_id(model) else Path(model).name


def _list_measurements(run: Path) -> list[str]:
    found = read_metrics(run / RUN_LOG, "eval")
    evals = [record for record in found if record.get("prefixes", "fixed") == "fixed"]
    names = [name for name in ("accuracy", "reverse_kl", "forward_kl", "agreement") if evals and name in evals[0]]
    if len(evals) < 2 or not names:
        return []
    first, last = evals[0], evals[-1]
    rows = [f"| {name} | {first[name]:.4g} | {last[name]:.4g} |" for name in names]
    return ["| measured | before | after |", "|---|---|---|", *rows, ""]
