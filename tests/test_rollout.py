"""Sampling, held against plain transformers' generate and forward."""

import copy
from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest
import torch
from bench_paths import SCORES, add_key_bias
from conftest import StaysOn, follows, hf_distribution, hf_generate, hf_inputs, hf_logprobs, to_meta

import decoding
import rollout
import toy
from decoding import uniform
from model import decode, response_logprobs
from rollout import Continuation, generate, question_keys, seed_of


def drawn(prompts, seed: int) -> list[str]:
    """The keys of another draw."""
    return question_keys([prompt.question for prompt in prompts], seed)


def test_greedy_equals_generate_of_transformers_token_for_token(policy, prompts):
    """All at once: prompts of different lengths, with no picture, one and two."""
    groups = generate(policy, prompts, 2, 40, temperature=0)
    lengths = []
    for prompt, group in zip(prompts, groups):
        want = hf_generate(policy, prompt, 40)
        lengths.append(len(want))
        with torch.no_grad():
            logprobs = hf_logprobs(policy, prompt, want)  # at temperature 1
        for sample in group:
            assert sample.prompt is prompt
            assert torch.equal(sample.tokens, want)
            torch.testing.assert_close(sample.logprobs, logprobs, atol=1e-4, rtol=0)
    assert len(set(lengths)) == len(lengths), "the rows must end at different times"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_behaviour_logprobs_equal_the_training_forward(own_policy, prompts, temperature):
    """Nothing is taken from generation_config: published ones carry a repetition penalty and a temperature."""
    policy, config = own_policy, own_policy.model.generation_config
    config.repetition_penalty, config.temperature, config.top_k, config.max_new_tokens = 1.5, 1e-6, 1, 3
    groups = generate(policy, prompts, 6, 30, temperature, drawn(prompts, 1))
    trees = [(group[0].prompt, [s.tokens for s in group]) for group in groups]
    samples = list(chain(*groups))
    with torch.no_grad():
        trained, _ = response_logprobs(policy, trees, temperature)
    for sample, row in zip(samples, trained):
        R = len(sample.tokens)
        torch.testing.assert_close(sample.logprobs, row[:R], atol=1e-4, rtol=0)
        assert sample.mask.all() and sample.mask.shape == sample.logprobs.shape == (R,)
    finishes = Counter(sample.finish for sample in samples)
    assert finishes["stop"] and finishes["length"] and max(len(sample.tokens) for sample in samples) == 30


def pooled(counts: Counter, probability: torch.Tensor) -> tuple[list, list]:
    """What `follows` takes, of tokens; those expected fewer than 5 times count as one."""
    total = sum(counts.values())
    common = [i for i, p in enumerate(probability.tolist()) if p * total >= 5]
    assert len(common) >= 5
    observed, expected = [counts[i] for i in common], probability[common].tolist()
    return [*observed, total - sum(observed)], [*expected, 1 - sum(expected)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_frequencies_follow_the_softmax(policy, prompts, temperature):
    """The first token of each response, and the second of those that share the likeliest first."""
    [group] = generate(policy, [prompts[1]], 12000, 2, temperature, drawn([prompts[1]], 2), max_rows=12000)
    first = Counter(int(s.tokens[0]) for s in group)
    going_on = [i for i, _ in first.most_common() if i not in policy.eos_ids]
    likeliest = torch.tensor([going_on[0], 0])
    with torch.no_grad():
        table = hf_distribution(policy, prompts[1], likeliest, temperature).exp()
    second = Counter(int(s.tokens[1]) for s in group if s.tokens[0] == likeliest[0])
    assert follows(*pooled(first, table[0])) and follows(*pooled(second, table[1]))
    wrong = table[0] ** 1.2 / (table[0] ** 1.2).sum()  # the test can tell a distribution so close
    assert not follows(*pooled(first, wrong))


def test_uniform_numbers_are_those_of_splitmix64_and_are_uniform():
    """The first numbers that its author's C code draws from the state 1234567."""
    seed, place = torch.full((3,), 1234567), torch.arange(3)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    want = torch.tensor([(x >> 11) / 2**53 for x in published], dtype=torch.float64)
    assert torch.equal(uniform(seed, place), want)
    seed = torch.tensor([seed_of("a key", g) for g in range(400)])[:, None]
    drawn = uniform(seed, torch.arange(100)).flatten()
    assert follows(torch.histc(drawn, 50, 0, 1), torch.full((50,), 1 / 50))
    pairs = torch.histogramdd(torch.stack((drawn[:-1], drawn[1:]), 1), 7, range=[0.0, 1, 0, 1]).hist
    assert follows(pairs.flatten(), torch.full((49,), 1 / 49))


def said(group) -> list[list[list[int]]]:
    """The tokens of each response, and of its second look."""
    return [[x.tokens.tolist() for x in (s, s.second_look) if x] for s in group]


@pytest.mark.parametrize("max_rows", [3, 8, 256])
def test_a_response_is_the_same_whatever_is_sampled_beside_it(own_policy, prompts, max_rows):
    """In any order, at most so many rows at once, on ranks of their own; second looks included."""
    policy = own_policy.double()
    several = [*prompts, prompts[1]]  # a question that comes twice says something else
    keys = drawn(several, 3)
    extend = extend_every([30, 31], 25)
    whole = [said(g) for g in generate(policy, several, 3, 25, 1.0, keys, extend)]
    assert whole[1] != whole[4] and sum(len(x) == 2 for group in whole for x in group) >= 5
    for part in ([4, 2, 0, 1, 3], [0, 2, 4], [1, 3]):
        groups = generate(policy, [several[i] for i in part], 3, 25, 1.0,
                          [keys[i] for i in part], extend, max_rows)  # fmt: skip
        assert [said(g) for g in groups] == [whole[i] for i in part]


def test_banned_ids_are_never_sampled_even_when_their_logits_are_the_largest(own_policy, prompts):
    with torch.no_grad():  # tied: this is the head's weight too
        own_policy.text_model.embed_tokens.weight[own_policy.banned_ids] *= 1000
    for temperature in (0, 1.0):
        groups = generate(own_policy, prompts, 4, 20, temperature, drawn(prompts, 6))
        for prompt, group in zip(prompts, groups):
            for sample in group:
                row = hf_inputs(own_policy, prompt, torch.cat([prompt.input_ids, sample.tokens]))
                with torch.no_grad():
                    want = hf_logprobs(own_policy, prompt, sample.tokens)
                    logits = own_policy.model(**row).logits[0, len(prompt.input_ids) - 1 : -1]
                top = torch.isin(logits.argmax(-1), torch.tensor(own_policy.banned_ids))
                assert top.float().mean() > 0.5
                assert not set(sample.tokens.tolist()) & set(own_policy.banned_ids)
                torch.testing.assert_close(sample.logprobs, want, atol=1e-4, rtol=0)


def test_an_id_of_chance_0_is_not_drawn_where_rounding_opens_a_gap(policy, monkeypatch):
    """A GPU's cumulative sum may rise where nothing is added; here the look-up finds such a place."""
    banned = policy.banned_ids[0]
    monkeypatch.setattr(torch, "searchsorted", lambda table, u, right: torch.full_like(u, banned).long())
    hidden = torch.randn(5, policy.text_model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        token, logprob = rollout.sample_token(policy, hidden, 100.0, torch.arange(5), torch.zeros(5).long())
    assert banned not in token.tolist() and (logprob > -100).all()


# ---------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("score", SCORES)
def test_in_bf16_the_policy_that_samples_is_the_policy_that_learns(prompts, score):
    """Qwen's keys carry biases of hundreds; scores rounded to bf16 give a KL of 2e-3, 3e-2 and 3e-2 here."""
    policy = toy.new_policy(0, hidden=64, layers=2, heads=4)
    add_key_bias(policy, score)
    exact = copy.deepcopy(policy.bfloat16()).float()
    samples = list(chain(*generate(policy, prompts, 8, 20, 1.0, drawn(prompts, 1))))
    with torch.no_grad():
        trained, _ = response_logprobs(policy, [(s.prompt, [s.tokens]) for s in samples])
    difference = torch.cat([row[: len(s.tokens)] - s.logprobs for row, s in zip(trained, samples)])
    assert (difference.expm1() - difference).mean() < 2e-4  # an estimate of KL(sampler || trainer)
    if score <= 100:  # beyond, keys rounded to bf16 say something else, in training too
        for prompt, [sample] in zip(prompts, generate(policy, prompts, 1, 20, temperature=0)):
            with torch.no_grad():
                table = hf_distribution(exact, prompt, sample.tokens)
            said = table.gather(1, sample.tokens[:, None])[:, 0]
            torch.testing.assert_close(said, table.amax(-1), atol=0.02, rtol=0)


# ---------------------------------------------------------------------------- what a Sample holds


@pytest.mark.parametrize("limit", [15, 1])
def test_a_response_ends_at_its_first_eos_or_at_the_limit(policy, prompts, limit):
    assert generate(policy, [], 8, limit) == []
    for s in chain(*generate(policy, prompts, 8, limit, 1.0, drawn(prompts, 7))):
        *before, last = (i in policy.eos_ids for i in s.tokens.tolist())
        assert not any(before)
        assert s.finish == ("stop" if last else "length")
        assert last or len(s.tokens) == limit
        assert s.text == decode(policy, s.tokens)
        assert s.second_look is None and s.rethought is None


def test_a_long_response_outgrows_the_cache_unharmed_and_the_policy_is_left_in_the_mode_it_was_in(
    own_policy, prompts
):
    """Also while activations are checkpointed, when training mode keeps no cache."""
    own_policy.eos_ids = [0]  # one that greedy decoding does not say here
    own_policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    for training, prompt in zip((True, False), prompts):
        own_policy.train(training)
        [[sample]] = generate(own_policy, [prompt], 1, 150, temperature=0)
        assert own_policy.training is training and own_policy.model.training is training
        assert (sample.finish, len(sample.tokens)) == ("length", 150)
        assert torch.equal(sample.tokens, hf_generate(own_policy.eval(), prompt, 150))
        assert not sample.logprobs.requires_grad


@pytest.mark.parametrize(("max_rows", "tokens", "prefills"), [(256, 8192, 1), (8, 8192, 4), (256, 80, 3)])
def test_a_prompt_runs_once_whatever_is_sampled_and_extended_and_few_at_once(
    own_policy, prompts, monkeypatch, max_rows, tokens, prefills
):
    monkeypatch.setattr(rollout, "PREFILL_TOKENS", tokens)
    runs, prefill = [], own_policy.prefill
    own_policy.prefill = lambda some: runs.append([len(p.input_ids) for p in some]) or prefill(some)
    generate(own_policy, prompts, 8, 20, 1.0, drawn(prompts, 10), extend_every([30, 31], 20), max_rows)
    assert sum(map(len, runs)) == len(prompts) and len(runs) == prefills
    assert all(len(run) == 1 or len(run) * max(run) <= tokens for run in runs)


# ---------------------------------------------------------------------------- CUDA graphs


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_decoding_step_looks_at_no_value_and_copies_from_no_other_device(own_policy, prompts, temperature):
    """What a CUDA graph needs, seen without a GPU: the step runs where tensors have no values."""
    extend = extend_every([30, 31], 16)
    sampler = rollout.Sampler(own_policy, prompts, 2, 16, temperature, None, extend, 8)
    with torch.no_grad():
        sampler.enter()
    sampler.arrange(8)
    sampler.policy, sampler.eos = to_meta(own_policy), sampler.eos.to("meta")
    sampler.rows = rollout.Rows(*(x.to("meta") for x in vars(sampler.rows).values()))
    cache = sampler.cache
    for pages in (cache.prompts, cache.responses):
        pages.change(lambda x: x.to("meta"))
    cache.layout = {name: x.to("meta") for name, x in cache.layout.items()}
    with torch.no_grad():
        sampler.next_token()  # once as it is, as before recording
        memory = addresses(sampler)
        with StaysOn("meta") as watch:
            sampler.next_token()
    assert watch.operations > 50
    assert addresses(sampler) == memory


def addresses(sampler) -> list:
    """Where all lies that a step reads and writes."""
    cache = sampler.cache
    pages = [x for pages in (cache.prompts, cache.responses) for x in (*pages.k, *pages.v)]
    tensors = [*vars(sampler.rows).values(), *cache.layout.values(), *pages]
    return [(id(x), x.shape) for x in tensors]


@pytest.mark.parametrize("extend", [False, True])
def test_a_recorded_step_meets_its_memory_where_it_was(own_policy, prompts, monkeypatch, extend):
    """With a stand-in for CUDA graphs that looks; and the tokens are those of unrecorded steps."""
    policy = own_policy.double()  # steps of another width round differently
    extend = extend_every([30, 31, 32], 60) if extend else None
    want = generate(policy, prompts, 4, 60, 1.0, drawn(prompts, 20), extend)
    records, replays = [], []

    def record(step):
        recorded = addresses(step.__self__)
        records.append(recorded)

        def replay():
            assert addresses(step.__self__) == recorded
            step()
            replays.append(1)

        return replay

    monkeypatch.setattr(rollout, "as_cuda_graph", record)
    monkeypatch.setattr(rollout, "recordable", lambda policy: True)
    got = generate(policy, prompts, 4, 60, 1.0, drawn(prompts, 20), extend, 8)
    assert [said(group) for group in got] == [said(group) for group in want]
    assert 2 < len(records) < len(replays)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_recorded_steps_say_what_plain_steps_say(own_policy, prompts):
    policy, found = own_policy.to("cuda"), []
    policy.eos_ids = policy.eos_ids[:2]  # long enough to be recorded anew
    for policy.cuda_graphs in (True, False):
        groups = generate(policy, prompts, 8, 300, 1.0, drawn(prompts, 21), extend_every([30, 31], 300))
        found.append([said(group) for group in groups])
    assert found[0] == found[1]


# ---------------------------------------------------------------------------- rows that are refilled


class Scripted:
    """In place of a policy: how long a response gets is lognormal, by its seed; nothing is computed.

    Counts decoding steps, the shapes that a GPU would record, and the most tokens that the cache has had room for.
    """

    device, eos_ids, training = torch.device("cpu"), [1], False
    eval = train = lambda self, *mode: None

    def __init__(self, monkeypatch, mean: float, sigma: float, longest: int):
        self.mean, self.sigma, self.longest, self.steps, self.peak = mean, sigma, longest, 0, 0
        self.shapes = set()
        for name in ("decode_step", "sample_token"):
            monkeypatch.setattr(rollout, name, getattr(self, name))
        for name in ("CHECK_EVERY", "PACK_BELOW"):
            monkeypatch.setattr(rollout, name, {"cpu": getattr(rollout, name)["cuda"]})
        monkeypatch.setattr(rollout, "decode", lambda policy, tokens: "")
        store = decoding.Cache.store

        def watched(cache, groups, keys, values):
            given = keys[0].shape[0] * keys[0].shape[2]
            store(cache, groups, keys, values)
            self.look_at(cache, given)

        monkeypatch.setattr(decoding.Cache, "store", watched)

    def look_at(self, cache, given: int = 0):
        room = sum(len(pages) * pages.size for pages in (cache.prompts, cache.responses))
        self.peak = max(self.peak, room + given)

    def prefill(self, prompts):
        keys, values = ([torch.zeros(len(prompts), 1, len(prompts[0].input_ids), 1)] for _ in "kv")
        return torch.zeros(len(prompts), 1), keys, values

    def decode_step(self, policy, cache, tokens, positions, at):
        self.steps += 1
        self.shapes.add(cache.shapes)
        self.look_at(cache)
        return torch.zeros(len(tokens), 1)

    def sample_token(self, policy, hidden, temperature, seed, place):
        z = (2 * uniform(seed, torch.tensor(0)) - 1).erfinv() * 2**0.5
        length = self.mean * (self.sigma * z - self.sigma**2 / 2).exp()
        token = (place + 1 >= length.clamp(1, self.longest)).long()
        return token, torch.zeros(len(token))


# The last two: the steps that these responses take in batches that run until their last row ends, and the
# tokens that such a batch's cache has room for: ended rows leave at three quarters, and it doubles when outgrown.
@pytest.mark.parametrize(
    ("questions", "group_size", "rows", "mean", "sigma", "longest", "steps", "peak"),
    [
        (128, 8, 256, 500, 0.5, 2048, 7596, 224_768),
        (128, 8, 256, 500, 0.7, 2048, 8188, 178_688),
        (128, 8, 256, 500, 0.9, 2048, 8188, 164_864),
        (256, 1, 64, 1000, 0.7, 8192, 20_364, 123_904),
    ],
)
def test_refilled_rows_take_few_steps_and_no_more_memory(
    prompts, monkeypatch, questions, group_size, rows, mean, sigma, longest, steps, peak
):
    """Training's shape at three spreads of length, and evaluation's; prompts of 400 tokens."""
    policy = Scripted(monkeypatch, mean, sigma, longest)
    one = replace(prompts[0], input_ids=torch.zeros(400, dtype=torch.long))
    groups = generate(policy, [one] * questions, group_size, longest, max_rows=rows)
    lengths = [len(s.tokens) for group in groups for s in group]
    assert len(lengths) == questions * group_size
    assert policy.steps <= sum(lengths) / rows + max(lengths)
    assert policy.steps <= steps / 2
    assert policy.peak <= peak
    assert len(policy.shapes) <= 24


# ---------------------------------------------------------------------------- forced tokens


def extend_every(forced, limit, keep=None):
    """Extend each response that ended by itself and leaves room. `keep` tokens of it stay, or all but its EOS."""

    def extend(n, g, sample):
        kept = keep or len(sample.tokens) - 1
        fits = sample.finish == "stop" and 1 <= kept and kept + len(forced) <= limit
        return Continuation(kept, forced, "a kind", limit) if fits else None

    return extend


def go_on(policy, prompt, said: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    """transformers' greedy continuation of a response that has begun."""
    longer = replace(prompt, input_ids=torch.cat([prompt.input_ids, said]))
    return hf_generate(policy, longer, max_new_tokens)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_forced_tokens_stand_where_they_were_fed(policy, prompts, temperature):
    """The second look has a limit of its own, below that of the response."""
    forced = [30, policy.eos_ids[5], 31]  # an id that ends a turn does not when it is forced
    asked, finishes = [], Counter()

    def extend(n, g, sample):
        asked.append((n, g))
        how = extend_every(forced, 37)(n, g, sample)  # room for a second part
        return how and replace(how, limit=38)

    groups = generate(policy, prompts, 8, 40, temperature, drawn(prompts, 11), extend)
    assert sorted(asked) == [(n, g) for n in range(len(prompts)) for g in range(8)]
    for first in chain(*groups):
        again = first.second_look
        assert (again is None) == (first.finish != "stop" or not 2 <= len(first.tokens) <= 35)
        assert first.rethought is None and first.mask.all()
        if again is None:
            continue
        start = len(first.tokens) - 1 + len(forced)
        assert again.tokens[:start].tolist() == [*first.tokens[:-1].tolist(), *forced]
        assert (~again.mask).nonzero()[:, 0].tolist() == [start - 3, start - 2, start - 1]
        assert again.mask.shape == again.logprobs.shape == again.tokens.shape
        assert again.rethought == "a kind" and again.second_look is None
        assert again.prompt is first.prompt and again.text == decode(policy, again.tokens)
        # y1's log-probabilities are those recorded at first; y2's, a fresh forward's.
        assert again.logprobs[: start - 3].equal(first.logprobs[:-1])
        with torch.no_grad():
            want = hf_logprobs(policy, first.prompt, again.tokens, temperature)
        torch.testing.assert_close(again.logprobs[start:], want[start:], atol=1e-4, rtol=0)
        *before, last = (i in policy.eos_ids for i in again.tokens[start:].tolist())
        assert not any(before) and again.finish == ("stop" if last else "length")
        assert last or len(again.tokens) == 38
        finishes[again.finish] += 1
    assert finishes["stop"] and finishes["length"]


@pytest.mark.parametrize(("max_rows", "keep"), [(256, None), (2, None), (256, 1)])
def test_a_greedy_second_look_equals_generate_from_prompt_response_and_trigger(
    policy, prompts, max_rows, keep
):
    """From all of the response but its EOS, or cut back to its first token."""
    forced = [30, 31, 32]
    groups = generate(policy, prompts, 2, 60, 0, None, extend_every(forced, 60, keep), max_rows)
    extended = 0
    for prompt, group in zip(prompts, groups):
        for first in group:
            assert torch.equal(first.tokens, hf_generate(policy, prompt, 60))
            again = first.second_look
            if again is not None:
                extended += 1
                begun = torch.cat([first.tokens[: keep or -1], torch.tensor(forced)])
                rest = go_on(policy, prompt, begun, 60 - len(begun))
                assert torch.equal(again.tokens, torch.cat([begun, rest]))
                assert (~again.mask).nonzero()[:, 0].tolist() == [len(begun) - i for i in (3, 2, 1)]
                with torch.no_grad():
                    want = hf_logprobs(policy, prompt, again.tokens)
                torch.testing.assert_close(again.logprobs[again.mask], want[again.mask], atol=1e-4, rtol=0)
    assert extended >= 6
