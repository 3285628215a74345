"""Asking a policy all questions of a benchmark: on many ranks, killed and resumed.

Every response is a line of OUT/NAME.jsonl, written and flushed as soon as it is complete, so a run that
is killed loses what was under way and goes on by id. A row that has ended is given the next question
(rollout.py): a long answer holds up no other. Under torchrun each rank answers every WORLD-th question
with a policy of its own and writes OUT/NAME.rankR.jsonl; rank 0 waits for the files to be complete
and merges them: only rank 0 waits, and there is no collective. Of a model that does not fit on a GPU,
`--tensor N` ranks hold a slice each and answer the same questions together.

What we do differently from the common kits: a response's randomness depends on the seed, the question
and the sample's number alone, so a resumed run draws what the killed one would have drawn, whatever
the number of rows and ranks; and responses made with other settings are never mixed in.
"""

import json
import os
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks import scores
from benchmarks.readers import Item
from config import MAX_PIXELS, MIN_PIXELS, Config
from data import TEMPLATES, UserError, check_images, read_json, read_jsonl
from record import seal, write_atomically

PATIENCE = 3600  # seconds that rank 0 waits for one more answer of the others
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

AGAIN = {"response": str, "finish": str, "tokens": int, "trigger": str}
ANSWER = {"id": str, "response": str, "finish": str, "tokens": int, "sample?": int, "again?": AGAIN}

# How a policy is asked where no flag says otherwise; 0 are the checkpoint's own bounds of a picture.
PAPER = {"template": "plain", "max_new_tokens": 8192, "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
TOY = dict.fromkeys(PAPER, 0) | {"template": "bare", "max_new_tokens": 64}


def trainer_config(model: str) -> dict:
    """The training settings of a checkpoint of train.py; {} for any other model."""
    path = Path(model) / "trainer.json"
    return read_json(path, {"config": dict})["config"] if model and path.is_file() else {}


def made_with(config, name: str) -> dict:
    """What responses depend on, of eval.py's Config; a local model by the time it was saved too."""
    wanted = ("model", "temperature", "samples", "max_prompt_tokens", "seed", "data", "force_rethink")
    settings = {key: getattr(config, key) for key in wanted}
    weights = list(Path(config.model).glob("*.safetensors"))
    settings["saved"] = int(max((file.stat().st_mtime for file in weights), default=0))
    defaults = TOY if name == "toy" else PAPER
    if name in ("own", "toy"):  # as in training
        trained = trainer_config(config.model)
        defaults = {key: trained.get(key, value) for key, value in defaults.items()}
    settings |= {key: getattr(config, key) or value for key, value in defaults.items()}
    if settings["template"] not in TEMPLATES:
        raise UserError(f"{config.model}: its template {settings['template']!r} is unknown; give --template")
    return settings


def claim(out: Path, name: str, settings: dict) -> None:
    """Note in OUT/NAME.run.json what its responses are made with; refuse to mix in others."""
    made, main = out / f"{name}.run.json", out / f"{name}.jsonl"
    old = read_json(made) if made.exists() else settings
    if old != settings:
        other = next(key for key in settings | old if old.get(key) != settings.get(key))
        raise UserError(
            f"{main}: was made with {other} {old.get(other)}, not {settings.get(other)}; give another --out"
        )
    if main.exists() and not made.exists():
        raise UserError(f"{main}: holds responses that were only marked here; give another --out")
    if RANK == 0:
        write_atomically(made, json.dumps(settings, indent=1))


def read_answers(out: Path, name: str) -> dict[str, dict[int, dict]]:
    """{id: {sample number: answer}} so far; a last line that a kill cut is passed over."""
    found: dict[str, dict[int, dict]] = {}
    # Other ranks' files first: rank 0 removes them when the main one holds everything.
    for path in (*sorted(out.glob(f"{name}.rank*.jsonl")), out / f"{name}.jsonl"):
        for _, row in read_jsonl(path, ANSWER, growing=True) if path.exists() else ():
            found.setdefault(row["id"], {})[row.get("sample", 0)] = row
    return found


def answers_from_model(name: str, items: list[Item], out: Path, settings: dict, config) -> dict:
    """{id: [answer]} by asking what is not in OUT yet, each rank its share.

    settings  what the answers depend on (`made_with`); config  the rest, such as --rows
    """
    claim(out, name, settings)
    answers = read_answers(out, name)
    if config.tensor > 1:
        import parallel

        answers = parallel.from_first(answers)  # ranks that answer together must ask the same

    def missing() -> int:
        return sum(len(answers.get(item.question.id, ())) < settings["samples"] for item in items)

    if missing():
        path = out / (f"{name}.rank{RANK}.jsonl" if RANK else f"{name}.jsonl")
        if RANK % config.tensor:
            path = Path(os.devnull)  # the first of those that answer together writes
        elif path.exists():  # without what a kill left of a last line
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        with open(path, "ab") as file:
            ask(items, answers, settings, config, file)
        answers = read_answers(out, name)
    left, since = missing(), time.monotonic()
    while RANK == 0 and left:  # other ranks are still answering
        if time.monotonic() - since > PATIENCE:
            raise UserError(
                f"{out}: {left} questions of other ranks got no answer in {PATIENCE} s; "
                "end them, and give the same line again"
            )
        time.sleep(0.2)
        answers = read_answers(out, name)
        if missing() < left:
            left, since = missing(), time.monotonic()
    return {id_: [found[k] for k in sorted(found)] for id_, found in answers.items()}


def bring_policy(settings: dict, tensor: int):
    """The policy on this rank's device, or its slice of it: bfloat16 on a GPU, float32 on a CPU."""
    import torch  # late, because marking responses needs none of it

    import checkpoint
    import parallel
    from model import find_checkpoint, load_policy

    if WORLD > 1:
        parallel.end_with_parent()
    directory = find_checkpoint(settings["model"])
    checkpoint.check_model(directory)
    device = parallel.own_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    areas = {name: settings[name] for name in ("min_pixels", "max_pixels")}
    if tensor == 1:
        return load_policy(str(directory), dtype, **areas).to(device)
    policy = load_policy(str(directory), dtype, empty=True, **areas).requires_grad_(False)
    policy.slices = parallel.slices(policy, tensor)
    policy = parallel.shard(policy, device)
    checkpoint.load_weights(directory, policy)
    return policy


def ask(items: list[Item], answers: dict, settings: dict, config, file) -> None:
    """Ask this rank's share of the questions, the longest prompts first; append what comes."""
    from model import prompt_length

    policy = bring_policy(settings, config.tensor)
    policy.cuda_graphs = config.cuda_graphs

    sizes = check_images([item.question for item in items], show=RANK == 0)
    lengths = [
        prompt_length(policy, item.question, item.template or settings["template"], size)
        for item, size in zip(items, sizes, strict=True)
    ]
    order = sorted(range(len(items)), key=lambda i: -lengths[i])
    samples, credits = settings["samples"], []
    known = [answers.get(item.question.id, {}) for item in items]
    mine = [i for i in order[RANK // config.tensor :: WORLD // config.tensor] if len(known[i]) < samples]
    short = [i for i in mine if lengths[i] <= settings["max_prompt_tokens"]]
    with tqdm(total=len(mine) * samples, desc="responses", disable=RANK > 0) as bar:

        def write(i: int, k: int, answer: dict) -> None:
            line = scores.mark(items[i], answer) | ({"sample": k} if k else {})
            if k not in known[i]:
                file.write(seal(line).encode())
                file.flush()
            credits.append(scores.credit(line))
            bar.set_postfix(refresh=False, accuracy=f"{sum(credits) / len(credits):.3f}")
            bar.update()

        for i in mine[: len(mine) - len(short)]:  # the longest stand first
            for k in range(samples):
                write(i, k, {"response": "", "finish": "overlong", "tokens": 0})

        def finished(n: int, k: int, sample) -> None:
            sample.prompt.pixel_values = None  # seen, and too large to keep all of them
            write(short[n], k, answer_of(sample))

        respond(policy, [items[i] for i in short], settings, config.rows, finished)


def respond(policy, items: list[Item], settings: dict, rows: int, finished) -> None:
    """Sample responses to the items; `finished` hears of each as soon as it is complete."""
    import torch

    from model import encode
    from parallel import weights_to_sample
    from rethink import extender
    from rollout import generate, question_keys

    # Encoded as they are needed: the pictures of a benchmark do not fit in memory.
    prompts = (encode(policy, x.question, x.template or settings["template"]) for x in items)
    keys = question_keys([item.question for item in items], settings["seed"])
    count, length = settings["samples"], settings["max_new_tokens"]
    # All that leave room look again; the trigger is drawn blindly.
    share = float(settings["force_rethink"])
    rethinking = Config(rethink_fraction=share, rethink_max_tokens=length, max_new_tokens=length)
    extend = extender(rethinking, policy.tokenizer, None, keys)
    try:
        with weights_to_sample(policy):
            generate(policy, prompts, count, length, settings["temperature"], keys, extend, rows, finished)
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory with --rows {rows}: lower it, or --max_pixels; what is done is kept"
        ) from None


def answer_of(sample) -> dict:
    """A Sample as scores.mark takes it, its forced second look beside it."""
    answer = {"response": sample.text, "finish": sample.finish, "tokens": len(sample.tokens)}
    if second := sample.second_look:
        answer["again"] = answer_of(second) | {"trigger": second.rethought}
    return answer
