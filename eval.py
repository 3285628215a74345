"""Run a policy over a benchmark, or mark responses that are there already.

    python eval.py                                             the newest toy checkpoint, held out
    python eval.py --model DIR --benchmark mathvista,mmmu --data FOLDER
    python eval.py --model DIR --data FILE.jsonl               own questions, laid out as in data.py
    python eval.py --benchmark mmmu --data FOLDER --responses FILE.jsonl      no model
    python eval.py --compare A/mmmu.jsonl B/mmmu.jsonl                        paired test

The paper's protocol (Section 4.2) is the default: greedy, one sample, up to 8192 new tokens,
pictures of 256 to 1280 times 28 x 28 pixels, the plain prompt. Written to --out:

    NAME.jsonl        one line per sample, appended as it comes; a killed run goes on by id
    NAME.run.json     the settings that the responses were made with
    summary.json      {NAME: accuracy, ci95, counts, groups, settings}

What we do differently from the released evaluator: a response is marked by its benchmark's own rule
(benchmarks/readers.py); several samples are drawn at temperature 0.6 as there, but without its top-p 0.95.
"""

import os

# Before torch loads, as in train.py: threads that wait sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import itertools
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from benchmarks import scores
from benchmarks.asking import AGAIN, RANK, answers_from_model, made_with, trainer_config
from benchmarks.readers import BENCHMARKS, Item
from benchmarks.sources import find_files, load
from config import flag, read_flags
from data import NUMBER, TEMPLATES, UserError, check_shape, load_questions, printable, read_json, read_rows
from record import lock_folder, seal, write_atomically
from reward import extract_answer, is_correct

# What --responses may say beside "id" and "response".
GIVEN = {"tokens?": (*NUMBER, type(None)), "finish?": (str, type(None)), "again?": AGAIN}


@dataclass
class Config:
    model: str = flag("", "directory or hub id of a Qwen-VL, or toy; default: newest toy checkpoint")
    benchmark: str = flag(
        "", f"of toy own {' '.join(BENCHMARKS)}, with commas; default: own with --data, else toy"
    )
    data: str = flag("", "file, directory or hub id; default: the benchmark's own hub id")
    out: str = flag("", "directory of the results; default: runs/eval, numbered if taken")
    responses: str = flag("", 'mark this .jsonl of {"id", "response"} instead of running a model')
    compare: tuple = flag(None, "compare two OUT/NAME.jsonl question by question")
    show: bool = flag(False, "print ten responses in which no answer was found, and why")
    limit: int = flag(0, "only the first so many questions; 0: all", low=0)
    samples: int = flag(1, "responses per question: adds pass@k and maj@k [P: 1]", low=1, high=1024)
    template: str = flag(
        "", "default: plain [P; 72B card: rethink]; own, toy: as in training", tuple(TEMPLATES)
    )
    temperature: float = flag(None, "default: 0, greedy; 0.6 with several samples [C: the same]", low=0)
    max_new_tokens: int = flag(
        0, "longest response; 0: 8192 [P]; own and toy: as in training", low=0, high=1 << 17
    )
    min_pixels: int = flag(0, "smallest area of a picture; 0: 256 visual tokens [P], the toy's own", low=0)
    max_pixels: int = flag(0, "largest area of a picture; 0: 1280 visual tokens [P], the toy's own", low=0)
    max_prompt_tokens: int = flag(
        32768, "questions with a longer prompt get no answer, counted", low=1, high=1 << 17
    )
    force_rethink: bool = flag(False, "also force responses that ended by themselves to look again (Fig. 7)")
    rows: int = flag(64, "responses decoded at once: their KV cache must fit", low=1)
    tensor: int = flag(1, "ranks of a node that share every layer and answer together; 1: none", low=1)
    cuda_graphs: bool = flag(True, "on a GPU, launch a decoding step as a whole")
    seed: int = flag(0, "of sampling; what is drawn does not depend on --rows or ranks")


def parse(argv: list[str]) -> Config:
    """Flags -> Config, defaults that depend on others filled in.

    >>> parse(["--benchmark", "mmmu", "--samples", "8"]).temperature
    0.6
    """
    config = Config(**read_flags(Config, "eval.py", __doc__, argv))
    config.benchmark = config.benchmark or ("own" if config.data else "toy")
    known = ("toy", "own", *BENCHMARKS)  # your own among them
    for name in names(config):
        if name not in known:
            raise UserError(f"--benchmark {name!r}: no such benchmark; there are {', '.join(known)}")
    if "own" in names(config) and (names(config) != ["own"] or not config.data):
        raise UserError("--benchmark own: give --data FILE with your questions, and no other benchmark")
    if names(config) == ["toy"] and config.data:
        raise UserError("--benchmark toy makes its questions: leave out --data, or ask --benchmark own")
    if config.temperature is None:
        config.temperature = 0.6 if config.samples > 1 else 0.0
    if 0 < config.temperature < 0.01:
        raise UserError(f"--temperature {config.temperature}: must be 0, or at least 0.01")
    if config.responses and len(names(config)) > 1:
        raise UserError("--responses holds the responses to one benchmark: give one --benchmark")
    return config


def names(config: Config) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in config.benchmark.split(",")))


def read_items(name: str, config: Config) -> list[Item]:
    """The questions of a benchmark, of the user's own file, or of the toy world's held-out side."""
    if name in BENCHMARKS:
        return load(name, config.data)
    if name == "own":
        questions = load_questions(config.data)
    else:
        import toy  # imports torch; marking the other benchmarks does not

        # The same questions as training measures on.
        trained = trainer_config(config.model)
        recipe, n = toy.level(trained.get("toy_level", "easy")), trained.get("heldout") or 128
        questions = toy.toy_questions(recipe, n, 0, heldout=True)

    def rule(question):
        return lambda text: is_correct(text, question.answer, question.choices)

    return [Item(q, rule(q), [q.category], extract=extract_answer) for q in questions]


def items_of(name: str, config: Config) -> tuple[list[Item], list[Item], set[str]]:
    """(items to be marked, items left out by whole strata, all ids)."""
    items = read_items(name, config)
    unused = {x.stratum for x in items if x.unsupported or (x.unaskable and not config.responses)}
    kept, left_out = ([x for x in items if (x.stratum in unused) == out] for out in (False, True))
    if not kept:
        raise UserError(f"{name}: none of {len(items)} questions can be marked by rules")
    return kept[: config.limit or None], left_out, {x.question.id for x in items}


def find_model(config: Config) -> str:
    """The directory or hub id to load: by default the newest toy checkpoint, or the toy's base."""
    if config.model not in ("", "toy"):
        return config.model
    if names(config) != ["toy"]:
        raise UserError(
            f"--benchmark {config.benchmark}: give a --model, a directory or hub id (the toy policy knows "
            "only the toy world)"
        )
    import checkpoint  # late: both import torch
    import toy

    found = [path for run in Path("runs").glob("*") for path in checkpoint.list_checkpoints(run)]
    found = [path for path in found if trainer_config(str(path)).get("data") == "toy"]
    if found and not config.model:
        return str(max(found, key=lambda path: path.stat().st_mtime))
    return str(toy.toy_policy_dir(toy.LEVELS["easy"]))


def result_folder(config: Config) -> Path:
    """--out; by default the first of runs/eval, runs/eval-2, ... that is free to use."""

    def is_free(out: Path) -> bool:
        for name in names(config):
            made, result = out / f"{name}.run.json", out / f"{name}.jsonl"
            if made.exists() and (config.responses or read_json(made) != made_with(config, name)):
                return False
            if result.exists() and not made.exists():  # responses that were only marked there
                return False
        return True

    numbered = (Path(f"runs/eval-{number}" if number > 1 else "runs/eval") for number in itertools.count(1))
    out = Path(config.out) if config.out else next(filter(is_free, numbered))
    out.mkdir(parents=True, exist_ok=True)
    return out


def first_line(name: str, count: int, made: dict, out: Path, config: Config) -> str:
    """What is evaluated, and which settings are not the benchmark's defaults."""
    who = config.responses or config.model
    facts = [f"{who} on {name}: {count:,} questions"]
    if not config.responses:
        usual = made_with(Config(model=config.model, temperature=0.0), name)
        facts += [f"{k} {v}" for k, v in made.items() if v != usual[k]] or ["default settings"]
    return printable(f"{', '.join(facts)}; results in {out}")


def answers_from_file(config: Config, name: str, out: Path, ids: set[str]) -> dict[str, list[dict]]:
    """{id: [answer]} of --responses. An unknown id, or more responses than samples, is an error."""
    result = out / f"{name}.jsonl"
    if (out / f"{name}.run.json").exists():
        raise UserError(f"{result}: holds a model's responses; give another --out")
    if config.limit and result.exists() and result.samefile(config.responses):
        raise UserError(f"{result}: --limit would drop the rest of it; give another --out")
    found: dict[str, list[dict]] = {}
    for place, row in read_rows(Path(config.responses)):
        if "id" not in row or not isinstance(row.get("response", 0), str | None):
            raise UserError(f'{place}: expected {{"id": ..., "response": "text"}}')
        check_shape(row, GIVEN, place)
        id_ = str(row["id"])
        if id_ not in ids:
            raise UserError(f"{place}: id {id_!r} is not in the data of {name}; ids look like {min(ids)!r}")
        found.setdefault(id_, []).append(row)
        if len(found[id_]) > config.samples:
            raise UserError(
                f"{place}: {len(found[id_])} responses to id {id_!r}, more than --samples "
                f"{config.samples}; remove some, or say how many there are"
            )
    if not found:
        raise UserError(f"{config.responses}: the file is empty")
    return found


def evaluate(config: Config, out: Path) -> dict[str, dict]:
    """All benchmarks asked for; each one's files are written before the next begins."""
    summaries = {}
    read_summary(out)  # what is wrong with it is said now, not after hours of work
    for name in names(config):
        items, left_out, ids = items_of(name, config)
        made = {"responses": config.responses} if config.responses else made_with(config, name)
        if RANK == 0:
            print(first_line(name, len(items), made, out, config))
        if config.responses:
            answers = answers_from_file(config, name, out, ids)
        else:
            answers = answers_from_model(name, items, out, made, config)
        if RANK > 0:
            continue
        marked = {
            item.question.id: scores.mark_all(item, answers.get(item.question.id, []), config.samples)
            for item in items
        }
        summary = scores.summarise(name, items, left_out, marked, config.samples)
        if name == "own":
            summary["label"] = Path(config.data).name
        if config.limit:
            summary["label"] += f", first {len(items)} only"
        summaries[name] = summary | {"settings": made | {"data": config.data, "limit": config.limit}}
        if not config.responses:  # a model's answers that a smaller --limit leaves out stay
            marked |= {id_: found for id_, found in answers.items() if id_ not in marked}
        lines = [seal(line) for lines in marked.values() for line in lines]  # in the order of the data
        write_atomically(out / f"{name}.jsonl", "".join(lines))
        for part in out.glob(f"{name}.rank*.jsonl"):
            part.unlink()
        known = read_summary(out) | {name: summaries[name]}
        write_atomically(out / "summary.json", json.dumps(known, indent=1))
        if config.show:
            print(scores.unanswered([line for item in items for line in marked[item.question.id]]))
    return summaries


def read_summary(out: Path) -> dict:
    path = out / "summary.json"
    return read_json(path) if path.exists() else {}


def run(config: Config) -> None:
    """What the flags ask for: a comparison, or an evaluation."""
    if config.compare:
        print(scores.compare(*config.compare))
        return
    if config.responses and RANK > 0:
        return
    if not config.responses:
        config.model = find_model(config)
        if config.tensor > 1:
            import parallel

            parallel.start()
    for name in names(config):  # a wrong path is said now, not after hours of work
        if name in BENCHMARKS:
            find_files(name, config.data)
    out = result_folder(config)
    with lock_folder(out) if RANK == 0 else nullcontext():
        summaries = evaluate(config, out)
    if RANK == 0:
        print("\n" + scores.table(summaries))


def main(argv: list[str]) -> int:
    try:
        run(parse(argv))
        return 0
    except (UserError, OSError) as error:
        kept = "" if isinstance(error, UserError) else "; what is done is kept"
        print(printable(f"eval.py: {error}{kept}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eval.py: stopped; the same line goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if parallel := sys.modules.get("parallel"):  # --tensor: a process group is to be left
        parallel.stop()
        parallel.leave(status)
    sys.exit(status)
