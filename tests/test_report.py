"""What report.py promises: all is in the page; nothing is run or fetched, whoever wrote it."""

import json
import re
from html.parser import HTMLParser

from pages import curves, transcripts
from report import write_report

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AA"
    "AAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)


def metrics_row(step: int, **changes) -> dict:
    return {
        "step": step, "episode": (step + 1) // 2, "reward": 0.5, "effective_queries": 0.75,
        "replayed": 0.25, "rethought": 0.1, "rethinks": 0.2, "response_length": 20.0,
        "truncated": 0.0, "entropy": 0.4, "clip_fraction": 0.001, "grad_norm": 1.5,
        "response_tokens": 300, "step_seconds": 1.5, "rethink_attempted": 3,
        "rethink_wrong_right": 2, "rethink_no_answer": 1,
    } | changes  # fmt: skip


def response(pieces: list, **changes) -> dict:
    text = "".join(text for text, _ in pieces)
    return {
        "text": text, "pieces": pieces, "right": True, "reward": 1.0, "advantage": 0.5,
        "finish": "stop", "tokens": 9, "rethought": None,
    } | changes  # fmt: skip


def group(step: int, text: str = "<image>What is 2 + 3?", responses: list | None = None) -> dict:
    trigger = "\n\nWait, does it seem right?"
    forced = [["\\boxed{4}.", False], [trigger, True], [" \\boxed{5}", False]]
    usual = [
        response(forced, rethought="self_questioning", outcome="wrong_right"),
        response([["\\boxed{4}<|im_end|>", False]], right=False, reward=0.0, advantage=-0.5, finish="length"),
    ]
    return {"step": step, "question": question("1", text), "responses": responses or usual}


def question(id_: str, text: str = "<image>What is 2 + 3?") -> dict:
    return {"id": id_, "text": text, "answer": "5", "images": [PIXEL]}


def answers(*said: tuple[str, ...], question=question) -> list[dict]:
    """heldout.jsonl: one tuple per question, with an answer per measurement; 5 is right."""
    rows = [{"step": 0, "question": question(f"q{i}")} for i in range(len(said))]
    for m in range(len(said[0])):
        for i, found in enumerate(texts[m] for texts in said):
            text = f"So \\boxed{{{found[0]}}}{found[1:]}"
            rows.append({"step": 4 * m, "id": f"q{i}", "text": text, "found": found[0],
                         "right": found[0] == "5", "tokens": 7})  # fmt: skip
    return rows


def write_run(folder, metrics=None, samples=None, config=None, held=()):
    """A run's folder, as train.py leaves it."""
    folder.mkdir(parents=True)
    if metrics is None:
        heldout = [{"step": step, "heldout_accuracy": 0.25 + step / 8} for step in (0, 4)]
        metrics = [heldout[0], *map(metrics_row, range(1, 5)), heldout[1]]
    samples = [group(0), group(2)] if samples is None else samples
    files = {"metrics.jsonl": metrics, "samples.jsonl": samples, "heldout.jsonl": held}
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(config or {"steps": 4, "ssr": "replay"}))
    return folder


class Elements(HTMLParser):
    """The page as a browser takes it: its elements, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(page)
        self.text = self.text.replace("\xa0", " ")

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.found if name == tag]


def page_of(*folders) -> str:
    return write_report(list(folders)).read_text(encoding="utf-8")


def charts_of(page: str) -> dict[str, list[str]]:
    """{a chart's title: what it says at each step}"""
    charts = re.findall("<article.*?<h3>(.*?)</h3>(.*?)</article>", page, re.DOTALL)
    return {title: re.findall("<title>(.*?)</title>", chart, re.DOTALL) for title, chart in charts}


def test_every_curve_of_a_run_is_drawn_with_its_values(tmp_path):
    page = page_of(write_run(tmp_path / "run"))
    told = charts_of(page)
    assert told["Held-out accuracy"] == ["step 0\n25 % greedy", "step 4\n75 % greedy"]
    looks = "0 % right → right\n0 % right → wrong\n66.7 % wrong → right\n0 % wrong → wrong\n33.3 % no answer"
    assert told["What forced second looks did"] == [f"step {step}\n{looks}" for step in range(1, 5)]
    assert told["Speed"][0] == "step 1\n200 tokens/s"
    assert {"Reward", "Entropy", "Gradient norm", "Replayed"} <= set(told)
    assert ">1,200</td>" in page  # response tokens
    labels = [svg["aria-label"] for svg in Elements(page).of("svg") if svg.get("role") == "img"]
    assert len(labels) == len(told) and "Held-out accuracy: greedy 25" in labels[0]


def test_runs_are_overlaid_and_their_settings_compared(tmp_path):
    first = write_run(tmp_path / "replay", config={"ssr": "replay", "seed": 1, "out": "a"})
    other = write_run(tmp_path / "plain", config={"ssr": "off", "seed": 1, "out": "b"})
    page = page_of(first, other)
    assert charts_of(page)["Entropy"][0] == "step 1\n0.4 nats replay\n0.4 nats plain"
    table = page.split("Where the settings differ")[1].split("</table>")[0]
    assert re.findall(r'<th scope="row">(\w+)', table) == ["ssr"]
    assert not (other / "report.html").exists()


def test_a_rollout_shows_what_was_forced_and_what_came_of_it(tmp_path):
    page = page_of(write_run(tmp_path / "run", samples=[group(0)]))
    assert '<mark class="forced" title="forced">Wait, does it seem right?</mark>' in page
    elements = Elements(page)
    assert "looked again: wrong → right" in elements.text
    assert "advantage +0.50" in elements.text and "advantage -0.50" in elements.text
    assert "✓" in elements.text and "✗" in elements.text and "cut off" in elements.text
    assert [picture["src"] for picture in elements.of("img")] == [PIXEL]
    assert "<|im_end|>" not in elements.text  # the end of a turn is hidden


def test_held_out_questions_show_what_became_of_their_answers(tmp_path):
    held = answers(("4", "5"), ("5", "5"), ("5", "6"), ("1", "2"), ("4", "5"))
    page = page_of(write_run(tmp_path / "run", held=held))
    section = page.split('id="heldout"')[1].split("</section>")[0]
    # Those that changed come first.
    assert re.findall(r'note id">(.*?)<', section) == ["q0", "q2", "q4", "q1", "q3"]
    for told in ("5 questions, from step 0 to step 4", "2 fixed", "1 broken", "4 → 5<"):
        assert told in section
    assert "2 fixed, 1 broken" in Elements(page).text


def test_a_reward_of_ones_own_is_a_number_on_an_axis_that_fits(tmp_path):
    rows = [metrics_row(1, reward=2.0), metrics_row(2, reward=2.5)]
    samples = [group(1, responses=[response([["\\boxed{5}", False]], reward=2.25)])]
    elements = Elements(
        page_of(write_run(tmp_path / "run", rows, samples, {"steps": 2, "reward": "mine.py:grade"}))
    )
    assert "reward 2.25" in elements.text and "2 → 2.5" in elements.text


def test_a_long_run_gives_a_page_that_still_opens(tmp_path):
    """1,000 steps at the paper's size: 256 photographs, 63 measurements, answers of 2048 tokens."""
    photo, words = PIXEL + "A" * 40_000, "Let us see, 3 < 4. " * 400
    asked = [question(f"q{i}") | {"images": [photo]} for i in range(256)]
    held = [{"step": 0, "question": q} for q in asked]
    held += [
        {"step": step, "id": q["id"], "text": words, "found": None, "right": False, "tokens": 2048}
        for step in range(0, 1001, 16)
        for q in asked[:: 1 if step in (0, 992) else 64]
    ]
    said = [response([[words, False], ["Wait,", True], [words, False]])] * 8
    pictured = question("1") | {"images": [photo] * 3}
    samples = [group(step, responses=said) | {"question": pictured} for step in range(0, 1000, 8)]
    page = page_of(write_run(tmp_path / "run", list(map(metrics_row, range(1, 1001))), samples, held=held))
    assert len(page.encode()) < 10_000_000
    told = charts_of(page)["Reward"]
    assert len(told) <= curves.MOST_POINTS and told[-1] == "step 1,000\n50 %"
    shown = re.findall(r'soft step">step (\d+)', page)
    assert len(shown) == transcripts.STEPS_SHOWN and (shown[0], shown[-1]) == ("0", "992")
    assert "128 of them are in this page" in page and "characters left out" in page


def test_whatever_a_model_or_a_data_set_wrote_is_text_and_nothing_is_run_or_fetched(tmp_path):
    marked = "\\boxed{" + HOSTILE + "} Wait, let's double check" + HOSTILE
    pieces = [[HOSTILE, False], [HOSTILE, True], [marked, False]]
    row = group(0, text=HOSTILE, responses=[response(pieces, not_kept=response(pieces))])
    images = [PIXEL + '"onload="alert(1)', "https://example.org/x.png", "//example.org/x.png", "x.png"]
    row["question"] |= {"answer": HOSTILE, "images": images}
    config = {"steps": 4, HOSTILE: HOSTILE}
    held = answers((HOSTILE, HOSTILE), question=lambda id_: question(HOSTILE, HOSTILE))
    held += [{"step": 0, "id": HOSTILE, "text": HOSTILE, "found": HOSTILE, "right": True, "tokens": 1}]
    folder = tmp_path / '" onload="<script>alert(1)<'
    write_run(folder, samples=[row], config=config, held=held)
    page = page_of(folder, write_run(tmp_path / "other"))
    elements = Elements(page)
    assert elements.text.count("document.title='owned'") >= 6
    assert not any(elements.of(tag) for tag in ("script", "link", "iframe"))
    assert [picture["src"][:22] for picture in elements.of("img")] == ["data:image/png;base64,"] * 2
    names = {name for _, attributes in elements.found for name in attributes}
    assert not any(name.startswith("on") or name == "href" for name in names)
    assert "url(" not in page and "@import" not in page
    assert "default-src 'none'" in elements.of("meta")[2]["content"]


def test_a_run_that_is_still_going_or_has_hardly_begun_can_be_looked_at(tmp_path):
    folder = write_run(tmp_path / "run", config={"steps": 60})
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(folder / name, "a") as file:
            file.write('{"step": 5, "rew')
    assert "4 of 60 steps" in page_of(folder)
    for text in ("", '{"step": 0, "heldout_accuracy": 0.5}\n', '{"step"'):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert page_of(tmp_path).count("None were written") == 2


def test_what_was_not_measured_is_left_out(tmp_path):
    rows = [metrics_row(1), metrics_row(2, grad_norm=None, reward=float("nan")), metrics_row(3)]
    page = page_of(write_run(tmp_path / "run", rows))
    assert ">Held-out accuracy</h3>" not in page  # no chart; in the summary, a dash
    assert "–</td>" in page and "nan" not in page
    assert charts_of(page)["Gradient norm"] == ["step 1\n1.5", "step 3\n1.5"]
