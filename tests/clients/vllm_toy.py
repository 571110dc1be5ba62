"""The toy behind vLLM's routes, honest or with one lie: what a probe must see through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.clients.toy import VOCAB, Toy, npy, refused

POST_ONLY = {"/inference/v1/generate", "/pause", "/resume", "/v1/load_lora_adapter", "/tokenize"}


@dataclass
class VllmToy:
    """Answers ``(method, path, body)`` as vLLM would.

    Attributes:
        limit: --max-logprobs; -1 for none.
        context: max_model_len.
        shift: Rows by which scores are out of place.
        noise: Added to every score.
        scores: False: prompt_logprobs is ignored with a 200.
        scores_follow_temperature: A lie of another kind.
        sampled: What sampled logprobs are of: "raw", "temperature" or "processed".
        speculative: Whether /metrics counts drafts.
        generate: Whether /inference/v1/generate is mounted.
        candidate_noise: Added to every candidate.
    """

    toy: Toy = field(default_factory=lambda: Toy(seed=9))
    limit: int = 20
    context: int = 256
    shift: int = 0
    noise: float = 0.0
    scores: bool = True
    scores_follow_temperature: bool = False
    sampled: str = "raw"
    speculative: bool = False
    generate: bool = True
    candidate_noise: float = 0.0

    def __call__(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        path = path.partition("?")[0]
        if method == "GET":
            return self._get(path)
        if path == "/v1/completions":
            return self._completions(body)
        if path == "/inference/v1/generate" and self.generate:
            return self._generate(body)
        return 404, {"detail": "Not Found"}

    def _get(self, path: str) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "t", "max_model_len": self.context}]}
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/metrics":
            return 200, b"vllm:spec_decode_num_drafts_total 3.0\n" if self.speculative else b"vllm:num_requests 0\n"
        if path in POST_ONLY and (self.generate or path != "/inference/v1/generate"):
            return 405, {"detail": "Method Not Allowed"}
        return 404, {"detail": "Not Found"}

    def _completions(self, body: dict[str, Any]) -> tuple[int, Any]:
        ids = body["prompt"]
        error = self._refusal(ids, body.get("prompt_logprobs"), body.get("logprobs"))
        if error:
            return error
        drawn = self._draw(ids, body)
        choice = {"index": 0, "finish_reason": "length", "token_ids": drawn, "prompt_logprobs": None, "logprobs": None}
        if self.scores and body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = self._scores(ids, body["prompt_logprobs"], body.get("temperature", 1.0))
        if body.get("logprobs") is not None:
            rows = self._sampled(ids, drawn, body)
            choice["logprobs"] = {
                "tokens": [f"token_id:{token}" for token in drawn],
                "token_logprobs": [self._json(row[t]) for row, t in zip(rows, drawn, strict=True)],
                "top_logprobs": [
                    {f"token_id:{t}": self._json(lp) for t, lp in [*self.toy.top(row, body["logprobs"]), (d, row[d])]}
                    for row, d in zip(rows, drawn, strict=True)
                ],
            }
        return 200, {"choices": [choice]}

    def _generate(self, body: dict[str, Any]) -> tuple[int, Any]:
        ids, sampling = body["token_ids"], body["sampling_params"]
        error = self._refusal(ids, sampling.get("prompt_logprobs"), sampling.get("logprobs"))
        if error:
            return error
        reply: dict[str, Any] = {"prompt_logprobs": None, "prompt_token_id_logprobs": None, "choices": []}
        if sampling.get("prompt_logprob_token_ids"):
            rows = self.toy.rows(ids)[sampling.get("prompt_logprob_start") or 0 :]
            values = [row[asked] for row, asked in zip(rows, sampling["prompt_logprob_token_ids"], strict=True)]
            reply["prompt_token_id_logprobs"] = npy(np.array(values) + self.candidate_noise)
        elif sampling.get("prompt_logprob_start") is not None:
            return refused("prompt_logprob_start requires prompt_logprob_token_ids.")
        elif self.scores and sampling.get("prompt_logprobs") is not None:
            reply["prompt_logprobs"] = self._scores(ids, sampling["prompt_logprobs"], sampling.get("temperature", 1.0))
        drawn = self._draw(ids, sampling)
        choice = {"index": 0, "finish_reason": "length", "token_ids": drawn, "logprobs": None}
        if sampling.get("logprobs") is not None:
            k = sampling["logprobs"]
            content = []
            for row, token in zip(self._sampled(ids, drawn, sampling), drawn, strict=True):
                listed = [token, *(t for t, _ in self.toy.top(row, k) if t != token)][:k]
                entries = [{"token_id": t, "logprob": self._json(row[t])} for t in listed]
                content.append({"token_id": token, "logprob": self._json(row[token]), "top_logprobs": entries})
            choice["logprobs"] = {"content": content}
        return 200, reply | {"choices": [choice]}

    def _refusal(self, ids: list[int], scored: int | None, sampled: int | None) -> tuple[int, Any] | None:
        if len(ids) >= self.context:
            return refused(f"This model's maximum context length is {self.context} tokens.")
        if max(ids) >= VOCAB:
            return refused(f"Token id {max(ids)} is out of vocabulary")
        for name, k in (("prompt", scored), ("sample", sampled)):
            wanted = VOCAB if k == -1 else k
            if wanted is not None and wanted > self.limit >= 0:
                return refused(
                    f"Requested {name} logprobs of {wanted}, which is greater than max allowed: {self.limit}"
                )
        return None

    def _draw(self, ids: list[int], body: dict[str, Any]) -> list[int]:
        temperature = 0.0 if body.get("min_p") == 1.0 else body.get("temperature", 1.0)
        return self.toy.draw(ids, body["max_tokens"], temperature=temperature, seed=body.get("seed") or 0)

    def _sampled(self, ids: list[int], drawn: list[int], body: dict[str, Any]) -> np.ndarray:
        rows = self.toy.rows([*ids, *drawn])[len(ids) - 1 :]
        heat = body.get("temperature", 1.0) or 1.0
        if self.sampled == "raw":
            return rows
        rows = rows / heat
        if self.sampled == "processed" and body.get("min_p") == 1.0:
            rows = np.where(rows >= rows.max(axis=1, keepdims=True), rows, -np.inf)
        return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))

    def _scores(self, ids: list[int], k: int, temperature: float) -> list[Any]:
        rows = self.toy.rows(ids)
        if self.scores_follow_temperature and temperature:
            rows = rows / temperature
            rows = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        rows = np.roll(rows, self.shift, axis=0) - self.noise
        k = VOCAB if k == -1 else min(k, VOCAB)
        out: list[Any] = [None]
        for row, token in zip(rows, ids[1:], strict=True):
            listed = [token, *(t for t, _ in self.toy.top(row, k) if t != token)]
            out.append(
                {
                    str(t): {
                        "logprob": float(row[t]),
                        "rank": int((row > row[t]).sum()) + 1,
                        "decoded_token": chr(65 + t),
                    }
                    for t in listed
                }
            )
        return out

    @staticmethod
    def _json(value: float) -> float:
        return float(max(value, -9999.0))
