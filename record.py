"""What a run writes, as JSON lines: metrics, rollouts, held-out answers, and when it was started."""

import base64
import datetime
import fcntl
import io
import itertools
import json
import math
import os
import shlex
import socket
import zlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from data import NUMBER, UserError, load_pictures, read_jsonl
from rethink import OUTCOMES, outcome
from ssr import effective_sample_size

HELDOUT_KEPT = 256  # questions whose answers are kept
# Fields that readers rely on in a line of metrics.jsonl, samples.jsonl and heldout.jsonl.
LINE = {"step": int, "heldout_accuracy?": NUMBER}


def lock_folder(folder: Path):
    """Take a folder for this process alone. Returns the locked file: closing it, or the end of the process,
    unlocks it."""
    file = open(folder / "lock", "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        how = "wait for it, end it, or give another --out"
        raise UserError(f"{folder}: in use by {file.read(200)}; {how}") from None
    except OSError:
        return file  # a file system that knows no locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's contents: a reader sees the old or the new, never a part."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def seal(row: dict) -> str:
    """A line of JSON with a checksum of itself, for `data.read_jsonl`: a flipped letter is another answer."""
    return json.dumps(row | {"line_crc32": zlib.crc32(json.dumps(row).encode())}) + "\n"


class Recorder:
    """Appends to OUT's files; off rank 0 it does nothing, so that the loop needs no `if`."""

    def __init__(self, out: Path, active: bool, resume_step: int | None = None):
        self.out, self.active = out, active
        self.measured = -1  # the last step with a held-out accuracy
        for name in ("metrics.jsonl", "samples.jsonl", "heldout.jsonl") if active else ():
            for row in forget_after(out / name, -1 if resume_step is None else resume_step):
                if "heldout_accuracy" in row:
                    self.measured = max(self.measured, row["step"])

    def start(self, step: int, argv: list[str], ranks: int) -> None:
        """One line of starts.jsonl per start or resumption: when, and with which command line."""
        date = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
        command = shlex.join(["train.py", *argv]) + (f" ({ranks} ranks)" if ranks > 1 else "")
        self.append("starts.jsonl", {"step": step, "date": date, "command": command})

    def metrics(self, row: dict) -> None:
        """One line of metrics.jsonl. Floats are written exactly: a resumed run can be compared."""
        # JSON has no nan: what is not finite is null.
        odd = {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
        self.append("metrics.jsonl", {k: None if k in odd else v for k, v in row.items()})

    def samples(self, step: int, groups: list, tokenizer) -> None:
        """Rollouts to look at: question, picture and every response of these groups."""
        for group in groups if self.active else []:
            question = show_question(group[0].prompt.question)
            responses = [describe(sample, tokenizer) for sample in group]
            self.append("samples.jsonl", {"step": step, "question": question, "responses": responses})

    def heldout(self, questions: list, row: dict, answers: list[dict]) -> None:
        """A measurement: its line of metrics.jsonl, and a line of heldout.jsonl per greedy answer.

        The questions and their pictures are written once, before the first answers; the metrics last, since
        where they are missing a resumed run measures again.
        """
        path, kept = self.out / "heldout.jsonl", questions[:HELDOUT_KEPT] if self.active else []
        if not path.exists() or path.stat().st_size == 0:
            for question in kept:
                self.append(path.name, {"step": row["step"], "question": show_question(question)})
        ids = {question.id for question in kept}
        for answer in answers:
            if answer["id"] in ids:
                self.append(path.name, answer)
        self.metrics(row)

    def summary(self, step: int, total: int, saved: list[Path]) -> str:
        """The last line of a run: what was learnt, where it is, and how to go on."""
        rows = [row for _, row in read_jsonl(self.out / "metrics.jsonl", LINE)]
        heldout = [row["heldout_accuracy"] for row in rows if "heldout_accuracy" in row]
        learnt = f"held-out accuracy {heldout[0]:.2f} -> {heldout[-1]:.2f}; " if heldout else ""
        where = f"checkpoint: {saved[-1]}"
        if step < total:
            how = f"go on with --resume --out {self.out} and the same flags as before"
            return f"stopped after step {step} of {total}; {where}; {how}"
        return f"{step} steps; {learnt}{where}"

    def append(self, name: str, row: dict) -> None:
        if self.active:
            with open(self.out / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def write_config(out: Path, config) -> None:
    write_atomically(out / "config.json", json.dumps(asdict(config), indent=1))


def step_metrics(run, branches: list, numbers: Counter) -> dict:
    """A step's line of metrics.jsonl: `branches` were trained on, `numbers` came of it (train.update)."""
    c, counts = run.config, Counter(run.counts)
    responses = max(1, counts["responses"])  # not by the flags: they may have changed when a run was resumed
    draws, tokens = sum(b.draws for b in branches), max(1, numbers["tokens"])
    replayed = sum(b.replays for b in branches)
    age = sum((run.step - b.sample.step) * b.replays for b in branches)
    replayed_tokens = numbers["replayed_tokens"]
    clipped, clipped_replayed = numbers["clipped"], numbers["clipped_replayed"]
    finite = math.isfinite(numbers["grad_norm"])
    return {
        "step": run.step + 1, "episode": run.episode,
        "reward": counts["rewards"] / responses,
        "effective_queries": counts["effective"] / max(1, counts["questions"]),
        "replayed": replayed / max(1, draws), "replay_age": age / max(1, replayed),
        "replay_ess": effective_sample_size([b.replays for b in branches]),
        "batch_responses": draws,
        "loss": numbers["loss"], "sft_loss": numbers["sft_loss"],
        "grad_norm": numbers["grad_norm"] if finite else None,
        "clip_fraction": clipped / tokens,
        "clip_fraction_fresh": (clipped - clipped_replayed) / max(1, tokens - replayed_tokens),
        "clip_fraction_replayed": clipped_replayed / max(1, replayed_tokens),
        "entropy": numbers["entropy"] / trained if (trained := numbers["trained_tokens"]) else None,
        "prompt_share": numbers["prompt_tokens"] / max(1, numbers["row_tokens"]),
        "logp_mismatch": counts["mismatch"] / max(1, counts["mismatch_tokens"]),
        "logp_mismatch_max": counts["mismatch_max"],
        "logp_mismatch_kl": counts["mismatch_kl"] / max(1, counts["mismatch_tokens"]),
        "response_length": counts["response_tokens"] / responses,
        "response_tokens": counts["response_tokens"] * c.batch_size / responses,
        "truncated": counts["truncated"] / responses,
        "rethinks": counts["rethinks"] / responses, "rethinks_helped": counts["rethinks_helped"] / responses,
        "overthinking": counts["overthinking"] / responses, "rethought": counts["kept"] / responses,
        **{f"rethink_{name}": counts[name] for name in ("attempted", "kept", "tokens", *OUTCOMES)},
        "lr": numbers.get("lr"),  # null where nothing was trained
        "skipped": not numbers or not finite,
    }  # fmt: skip


def heldout_metrics(run, counts: Counter) -> dict:
    """A measurement's line of metrics.jsonl, from what train.measure has counted."""
    n = len(run.heldout)
    names = ["accuracy", "sampled", "tokens", "rethinks", "rethinks_helped", "overthinking"]
    if run.config.data == "toy":
        names += ["fast", "slow", "twice"]
    row = {"step": run.step} | {f"heldout_{name}": counts[name] / n for name in names}
    categories = sorted({q.category for q in run.heldout})
    row["heldout_categories"] = {k: counts["right", k] / counts["n", k] for k in categories}
    return row


def forget_after(path: Path, step: int) -> list[dict]:
    """Drop the lines of later steps, which the run that is resumed writes again, and one that a kill has cut.
    Returns what is kept."""
    if not path.exists():
        return []
    rows = [row for _, row in read_jsonl(path, LINE, growing=True) if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def describe(sample, tokenizer) -> dict:
    """A response for samples.jsonl. `pieces` alternates [text, forced?]: what was sampled, what was not;
    `not_kept` is the forced second look that did not take its place."""
    mask, tokens = sample.mask.tolist(), iter(sample.tokens.tolist())
    runs = [(sampled, len([*run])) for sampled, run in itertools.groupby(mask)]
    pieces = [[tokenizer.decode([*itertools.islice(tokens, n)]), not sampled] for sampled, n in runs]
    names = ("text", "right", "reward", "advantage", "finish", "rethought")
    row = {name: getattr(sample, name) for name in names} | {"pieces": pieces, "tokens": len(mask)}
    if sample.rethought:
        row["outcome"] = outcome(sample.first_right, sample.answered, sample.right)
    if sample.second_look:
        row["not_kept"] = describe(sample.second_look, tokenizer)
    return row


def show_question(question) -> dict:
    """A question as the page needs it, its pictures within."""
    row = {name: getattr(question, name) for name in ("id", "text", "answer", "category")}
    return row | {"images": [thumbnail(picture) for picture in load_pictures(question)]}


def thumbnail(image, side: int = 336) -> str:
    """A picture as a data URI of at most `side` pixels: drawings as PNG, photographs as JPEG."""
    image.thumbnail((side, side))
    coded = []
    for kind in ("png", "jpeg"):
        image.save(buffer := io.BytesIO(), kind)
        data = base64.b64encode(buffer.getvalue()).decode()
        coded.append(f"data:image/{kind};base64,{data}")
    return min(coded, key=len)
