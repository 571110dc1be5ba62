"""Checks every teacher server before loading a model: reachable, K supported, same tokenizer as the student."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from topkd.clients import ClientConfig
from topkd.clients.connection import ScoringClient, connect
from topkd.clients.decoding.byte_map import ByteMap, load_bytemap
from topkd.clients.dialects.base import Wire
from topkd.clients.dialects.records import find_dialect
from topkd.clients.probe import tokens as probe_tokens
from topkd.clients.probe.session import SCORING, TOKENS, Session, Teacher
from topkd.compose.config.run_config import RunConfig
from topkd.compose.config.tables import TeacherConfig
from topkd.compose.data.byte_maps import load_student_byte_map
from topkd.compose.progress import Progress
from topkd.files import write_atomically
from topkd.topk.errors import ConfigError

_COMPARED = ("same", "yes")  # first word of ``TeacherInfo.tokenizer`` if the tokenizers were compared
_STUDENT = "student"  # key in the file: the fingerprint of the student's tokenizer
_SHORT = 8  # tokens of the request that tries K


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """Facts about a teacher's server, found before the run.

    Attributes:
        url: Its URL (each replica has its own facts).
        model: Name of the model on the server.
        dialect: API of the server.
        version: Version of the server; "" if it does not return one.
        context: Largest number of tokens in a request; None if it does not return one.
        k: Entries per position that it has returned.
        tokenizer: "same" if its ids are the student's, else the reason why this could not be found out.
    """

    url: str
    model: str
    dialect: str
    version: str
    context: int | None
    k: int
    tokenizer: str


async def check_teachers(
    config: RunConfig, progress: Progress, kept: Path | None = None, *, resumed: bool = False
) -> dict[str, TeacherInfo]:
    """Check every teacher behind a server; raise an error if one cannot teach this student.

    The results are written to ``kept``. In a ``resumed`` run, a server is not compared again if it was compared with
    the same tokenizer and still describes itself in the same way.

    Raises:
        ServerUnreachableError: A server does not answer. It is raised within seconds, whatever the run's retries are.
        KLimitError: K is above the server's limit.
        ConfigError: The teacher's ids are not the student's.
    """
    served = {name: teacher for name, teacher in select_teachers(config).items() if teacher.kind == "server"}
    student = _load_byte_map(config.student.model) if served else ""
    known = _read_known(kept, student) if kept is not None and resumed else {}
    teachers: dict[str, TeacherInfo] = {}
    for name, teacher in served.items():
        for url in teacher.urls:
            progress.note(f"asking the teacher at {url}")
            known[url] = found = await _check_teacher(url, teacher, config, student, known.get(url))
            if found.tokenizer != "same":
                progress.note(f"the tokenizer at {url} was not compared with the student's: {found.tokenizer}")
            if name not in teachers or (found.context or 0) < (teachers[name].context or 0):
                teachers[name] = found
    if kept is not None and known:
        tokenizer = {} if isinstance(student, str) else {_STUDENT: student.fingerprint}
        entries = [asdict(info) | tokenizer for info in known.values()]
        await asyncio.to_thread(write_atomically, kept, json.dumps(entries, indent=2) + "\n")
    return teachers


def select_teachers(config: RunConfig) -> dict[str, TeacherConfig]:
    """Select the teachers that a run uses.

    Cross-entropy on the data's own completions (sft) uses a server only for the ceiling of the evaluation.
    """
    table = config.eval
    has_ceiling = table is not None and table.scorer is not None and table.ceiling
    if not config.objective.is_data_only or has_ceiling:
        return config.teacher_map()
    return {name: teacher for name, teacher in config.teacher_map().items() if teacher.kind != "server"}


def check_same_ids(teacher: str, student: str) -> None:
    """Raise ConfigError with the first id that stands for different text in the two tokenizers."""
    teacher_map, own_map = load_bytemap(teacher), load_bytemap(student)
    if teacher_map.fingerprint == own_map.fingerprint:
        return
    ids = sorted(teacher_map.token_bytes.keys() | own_map.token_bytes.keys())
    differ = [token for token in ids if teacher_map.token_bytes.get(token) != own_map.token_bytes.get(token)]
    raw = [table.token_bytes.get(differ[0]) for table in (teacher_map, own_map)]
    spellings = ["nothing" if token is None else repr(token.decode("utf-8", "replace")) for token in raw]
    raise ConfigError(
        "the teacher's tokens are not the student's", where=f"{teacher} and {student}",
        got=f"{len(differ)} ids differ, the first is {differ[0]}: teacher {spellings[0]}, student {spellings[1]}",
        expected="the same tokenizer for both: topkd sends token ids, not text",
    )  # fmt: skip


def shorten_patience(config: ClientConfig) -> ClientConfig:
    """Return the client's settings with retries of seconds, not minutes, for the first request to a server."""
    return config.model_copy(
        update={
            "max_retries": min(config.max_retries, 3),
            "pause_timeout_s": min(config.pause_timeout_s, 60.0),
            "backoff_s": min(config.backoff_s, 0.2),
            "backoff_max_s": min(config.backoff_max_s, 1.0),
        }
    )


async def _check_teacher(
    url: str, teacher: TeacherConfig, config: RunConfig, student: ByteMap | str, known: TeacherInfo | None
) -> TeacherInfo:
    key, model = teacher.api_key(), teacher.model
    async with await connect(
        url,
        dialect=teacher.dialect,
        model=model,
        api_key=key,
        config=shorten_patience(config.client),
        vocab_size=teacher.vocab_size,
    ) as client:
        info = await client.server_info()
        answer = TeacherInfo(url, info.model, client.dialect, info.version, info.max_model_len, config.k, "")
        if known is not None and asdict(known) == asdict(answer) | {"tokenizer": known.tokenizer}:
            return known
        wire = Wire(client)
        table = None if isinstance(student, str) else student
        prompt = await probe_tokens.probe_prompt(wire, info.model, table)
        await client.score(prompt[:_SHORT], 0, config.k)
        session = Session(client, cast("Teacher", client), wire, info, prompt, table)
        session.know(score_k=config.k)
        verdict = student if isinstance(student, str) else await _compare_tokenizers(session, client, url)
    return replace(answer, tokenizer=verdict)


async def _compare_tokenizers(session: Session, client: ScoringClient, url: str) -> str:
    if find_dialect(client.dialect).spells:
        await session.ask("spelling", SCORING, "spelling of ids", probe_tokens.check_spelling)
    if not await session.ask("tokenizer", TOKENS, "the student's tokenizer", probe_tokens.check_tokenizer):
        return session.findings[-1].detail
    found = next(finding for finding in session.findings if finding.key == "tokenizer")
    if found.status == "fail":
        raise ConfigError(
            "the teacher cannot teach this student", where=f"{url}, model {session.info.model}", got=found.detail,
            expected="the same tokenizer for both: topkd sends token ids, not text",
        )  # fmt: skip
    return "same" if found.value.startswith("yes") else f"{found.value}, {found.detail}"


def _load_byte_map(student: str) -> ByteMap | str:
    """Load the byte map of the student's tokenizer, or return the reason why it cannot be loaded."""
    try:
        return load_student_byte_map(student)
    except ConfigError as error:
        return f"student.model {student!r}: {error.what}"


def _read_known(kept: Path, student: ByteMap | str) -> dict[str, TeacherInfo]:
    """Read what an earlier start found about servers that were compared with this tokenizer."""
    if isinstance(student, str):
        return {}
    try:
        entries: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8"))
        mine = [entry for entry in entries if entry.pop(_STUDENT, None) == student.fingerprint]
        found = [TeacherInfo(**entry) for entry in mine]
        return {info.url: info for info in found if info.tokenizer.startswith(_COMPARED)}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # then every server is checked again
