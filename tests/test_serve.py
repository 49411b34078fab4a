"""Facts about the engine: many at once, and each as if it were alone."""

import threading
import time

import jax
import numpy as np
import pytest

from gpt_jax import model as models
from gpt_jax import native, sample, sampling, tokenizers
from gpt_jax.serve import compiled, prefixes, slots
from gpt_jax.serve.engine import Closed, Engine, Full
from gpt_jax.serve.texts import Request
from tests import tiny

CONTEXT = 32
SETTINGS = sampling.settings(12, temperature=0.0)
TOKENIZER = tokenizers.train("byte", [])


def build(**changes):
    """A tiny model of bytes whose weights are large enough to say things."""
    cfg = tiny.cfg(context_length=CONTEXT, vocab_size=257, position="rope", **changes)
    params = models.init(cfg, jax.random.key(3))
    params = jax.tree.map(lambda x: 5 * x, params)
    return models.GPT(cfg), jax.device_put(params, jax.devices()[0])  # as runs.open


def engine(sizes=(1, 2, 4), queue=64, **options):
    model, params = build()
    fixed = {"tokenizer": TOKENIZER, "sizes": sizes, "queue": queue, **options}
    return Engine(model=model, params=params, **fixed)


@pytest.fixture(scope="module")
def running():
    """An engine of four slots that runs, all its programs compiled."""
    made = engine(ahead=True)
    made.start()
    assert made.compiled.wait(200)
    yield made
    assert made.close(10)


def ask(prompt, number=0, seed=5, stop=(), top=None, score=False, late=60.0, **changes):
    ids = prompt if isinstance(prompt, list) else list(prompt.encode())
    return Request(
        ids=ids,
        settings={**SETTINGS, **changes},
        seed=seed,
        number=number,
        stop=(*stop, 256),  # the end-of-text token of bytes
        top=top,
        score=score,
        deadline=time.monotonic() + late,
    )


class Answer:
    """What comes back of a request; `wait` until it is whole."""

    def __init__(self):
        self.pieces, self.ended = [], threading.Event()

    def __call__(self, piece):
        self.pieces.append(piece)
        if piece.reason:
            self.ended.set()

    def wait(self):
        assert self.ended.wait(60)
        assert sum(bool(piece.reason) for piece in self.pieces) == 1
        return self

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self):
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def prompt(self):
        return [token for piece in self.pieces for token in piece.prompt]

    @property
    def reason(self):
        return self.pieces[-1].reason


def answers(engine, requests):
    """Submits requests together and returns their Answers, ended."""
    found = [Answer() for _ in requests]
    engine.submit(list(zip(requests, found, strict=True)))
    return [answer.wait() for answer in found]


def alone(prompt, number=0, seed=5, stop=(), **changes):
    """The same request to `sample.texts`, which knows nothing of servers."""
    model, params = build()
    settings = {**SETTINGS, **changes}
    done = sample.texts(
        model=model,
        params=params,
        tokenizer=TOKENIZER,
        prompts=[prompt],
        count=number + 1,
        seed=seed,
        stop=list(stop),
        **settings,
    )
    return done[number]


MIXED = [
    {"prompt": "a", "max_new": 30},
    {"prompt": "The quick brown fox", "max_new": 7},
    {"prompt": "To be or not to be, that is", "max_new": 30},
    {"prompt": "x", "temperature": 1.0, "max_new": 25},
    {"prompt": "xyz", "temperature": 0.7, "top_k": 9, "number": 2, "max_new": 18},
    {"prompt": "q", "temperature": 1.3, "top_p": 0.8, "seed": 6, "max_new": 40},
    {"prompt": "r", "temperature": 1.0, "min_p": 0.1, "max_new": 3},
    {"prompt": "hello hello", "repetition_penalty": 1.7, "max_new": 20},
    {"prompt": "again", "frequency_penalty": 1.5, "max_new": 20},
    {"prompt": "anew", "presence_penalty": -2.0, "temperature": 0.9, "max_new": 20},
    {"prompt": "one", "max_new": 1},
    {"prompt": "b" * CONTEXT, "max_new": 4},
]


def test_texts_are_those_of_the_same_requests_alone(running):
    together = answers(running, [ask(**request) for request in MIXED])
    for request, answer in zip(MIXED, together, strict=True):
        wanted = alone(**request)
        assert (answer.text, answer.reason) == (wanted.text, wanted.reason), request
    assert len({answer.text for answer in together}) == len(MIXED)


def test_a_row_is_the_same_to_the_last_bit_whoever_else_is_there():
    model, params = build()
    mine = ask("mine", top=3, max_new=20)
    told = []
    for others in (0, 3):
        rows = slots.Slots(model, params, [4])
        rows.compile()
        heard = []
        for i in range(others):
            rows.prompt([40 + i] * (5 + i), 0)
            rows.join(entry(ask([40 + i], temperature=1.0)), "other", 5 + i)
        rows.prompt(mine.ids, 0)
        rows.join(entry(mine), "mine", len(mine.ids))
        for _ in range(10):
            (slot,) = [slot for slot, owner in rows.taken() if owner == "mine"]
            chosen = rows.step()
            heard.append((chosen.token_B[slot], chosen.logprob_B[slot].tobytes()))
            if others:  # somebody leaves at every step
                rows.leave(rows.taken()[0][0]) if rows.taken()[0][1] != "mine" else 0
        told.append(heard)
    assert told[0] == told[1]


def test_a_row_goes_on_where_it_was_when_the_batch_shrinks_under_it():
    model, params = build()
    rows = slots.Slots(model, params, [1, 2, 4])
    rows.compile()
    for owner in ("first", "second", "mine"):
        request = ask(owner, max_new=20)
        rows.prompt(request.ids, 0)
        slot, chosen = rows.join(entry(request), owner, len(request.ids))
    written = [int(chosen.token_B[0])]
    for _ in range(9):
        if len(written) == 4:
            rows.leave(0)
            rows.leave(1)
            for _ in range(slots.PATIENCE + 1):
                rows.fit(1)
        ((slot, _),) = rows.taken()[-1:]
        written.append(int(rows.step().token_B[slot]))
    assert rows.taken() == [(0, "mine")]
    assert bytes(written).decode(errors="replace") == alone("mine", max_new=10).text


def test_caches_reach_as_far_as_the_longest_row_needs(monkeypatch):
    monkeypatch.setattr(slots, "REACH", 8)
    monkeypatch.setattr(slots, "PATIENCE", 3)
    model, params = build()
    rows = slots.Slots(model, params, [1, 2])
    assert rows.reaches == [8, 16, 32]
    rows.compile()
    rows.ahead()
    before, written, seen = rows.programs(), [], []
    mine, other = ask("ab", max_new=20), ask("x" * 13, max_new=9)

    def join(request, owner):
        rows.prompt(request.ids, 0)
        _, chosen = rows.join(entry(request), owner, len(request.ids))
        seen.append(rows._batch.reach)
        return int(chosen.token_B[0])

    written.append(join(mine, 0))
    for count in range(1, 20):
        if count == 3:
            join(other, 1)
        if count == 9:
            rows.leave(1)
        written.append(int(rows.step().token_B[0]))
        seen.append(rows._batch.reach)
    # 13 tokens need 16, then, after four steps, 32; two and eleven again need 16.
    assert seen == [8, 8, 8, *[16] * 4, *[32] * 6, *[16] * 3, *[32] * 5]
    assert bytes(written).decode(errors="replace") == alone("ab", max_new=20).text
    rows.leave(0)
    for _ in range(5):  # who comes and goes meanwhile does not keep caches long
        join(ask("ab"), 0)
        rows.step()
        rows.leave(0)
    assert rows._batch.reach == 8
    join(ask("x" * 20), 0)
    rows.leave(0)
    rows.fit(0)
    assert rows._batch.reach == 8
    assert rows.programs() == before


def entry(request):
    return slots.entry(request, CONTEXT)


def test_requests_join_while_others_run_and_grow_and_shrink_the_batch(running):
    first = Answer()
    running.submit([(ask("long", max_new=25), first)])
    while not first.pieces:
        assert not first.ended.wait(0.001)
    more = answers(running, [ask(f"late {i}", max_new=5) for i in range(9)])
    assert [answer.text for answer in more] == [
        alone(f"late {i}", max_new=5).text for i in range(9)
    ]
    assert first.wait().text == alone("long", max_new=25).text
    assert running.running == running.waiting == 0


def test_nothing_is_compiled_after_the_start(running):
    """Nor in a few sizes only: there is every program in every shape."""
    before = running._slots.programs()
    lengths, sizes = len(slots.lengths(CONTEXT)), len(running._slots.sizes)
    assert before == 2 * lengths + 2 * sizes + 2 * (sizes - 1)
    requests = [
        ask("y" * n, top=2, score=True, max_new=9) for n in (1, 16, 17, CONTEXT)
    ]
    answers(running, [*requests, *(ask("z", temperature=1.0) for _ in range(4))])
    answers(running, [ask("z")])
    assert running._slots.programs() == before


def test_a_stop_string_ends_a_text_and_what_may_begin_one_is_held_back(running):
    whole = alone("stop me", max_new=30).text
    stop = whole[9:12]
    cut = whole.index(stop)
    (answer,) = answers(running, [ask("stop me", stop=[stop], max_new=30, top=0)])
    assert (answer.text, answer.reason) == (whole[:cut], "stop")
    # A token comes with the text it begins in, those of the stop string do not.
    spelled = "".join(token.text for token in answer.tokens)
    assert spelled.startswith(answer.text) and len(spelled) <= cut + 1


def test_log_probabilities_are_those_of_the_plain_model(running):
    model, params = build()
    request = ask("probable", top=4, score=True, temperature=1.0, max_new=6)
    (answer,) = answers(running, [request])
    ids = [*request.ids, *(token.id for token in answer.tokens)]
    logits_1TV, _ = model.apply({"params": params}, np.array([ids]))
    logp_TV = np.asarray(jax.nn.log_softmax(logits_1TV[0]))
    found = [*answer.prompt, *answer.tokens]
    assert [token.id for token in found] == ids and found[0].logprob is None
    for before, token in enumerate(found[1:]):
        best = np.argsort(-logp_TV[before])[:4]
        np.testing.assert_allclose(token.logprob, logp_TV[before, token.id], atol=1e-4)
        assert [i for i, _ in token.top] == best.tolist()
        np.testing.assert_allclose(
            [p for _, p in token.top], logp_TV[before, best], atol=1e-4
        )


def test_a_prompt_can_be_scored_without_writing(running):
    (answer,) = answers(running, [ask("score me", top=0, score=True, max_new=0)])
    assert (answer.text, answer.reason, answer.tokens) == ("", "length", [])
    assert len(answer.prompt) == len("score me")


def test_a_cancelled_request_is_gone_before_the_next_step(running):
    answer, steps = Answer(), []

    def deliver(piece):
        answer(piece)
        steps.append(running.steps)
        if len(answer.pieces) == 3:
            rows[0].cancel()

    rows = []
    rows += running.submit([(ask("cancel me", max_new=25), deliver)])
    answer.wait()
    assert answer.reason == "cancelled"
    assert len(answer.pieces) <= 5 and steps[-1] == steps[-2]


def test_a_late_request_ends_whether_it_runs_or_waits(running):
    (answer,) = answers(running, [ask("late", late=-1.0)])
    assert (answer.text, answer.reason) == ("", "late")


def test_a_full_queue_refuses_all_or_none_and_says_when_to_come_again():
    made = engine(sizes=[2], queue=1)  # not started: everything waits
    found = [Answer() for _ in range(4)]
    made.submit([(ask("a"), found[0]), (ask("b"), found[1])])
    with pytest.raises(Full) as refused:
        made.submit([(ask("c"), found[2]), (ask("d"), found[3])])
    assert refused.value.seconds >= 1
    assert made.waiting == 2
    made.submit([(ask("c"), found[2])])
    made.start()
    assert [answer.wait().reason for answer in found[:3]] == ["length"] * 3
    made.close(10)


def test_an_engine_that_closes_ends_what_runs_and_takes_no_more():
    made = engine(sizes=[1])
    found = [Answer(), Answer()]
    made.start()
    made.submit([(ask("a", max_new=25), found[0]), (ask("b"), found[1])])
    assert made.close(60)
    assert {answer.wait().reason for answer in found} <= {"cancelled", "length"}
    with pytest.raises(Closed):
        made.submit([(ask("c"), Answer())])


def test_an_engine_that_breaks_says_so_to_everybody(monkeypatch):
    made = engine(sizes=[1])
    made.start()
    assert made.ready.wait(60)
    monkeypatch.setattr(made._slots, "step", lambda **told: 1 / 0)
    found = answers(made, [ask("a"), ask("b")])
    assert [answer.reason for answer in found] == ["error", "error"]
    assert isinstance(made.failed, ZeroDivisionError)
    with pytest.raises(Closed, match="division"):
        made.submit([(ask("c"), Answer())])


def test_a_text_that_breaks_ends_alone(running):
    def broken(piece):
        pieces.append(piece)
        if not piece.reason:
            raise KeyError("mine")

    pieces, other = [], Answer()
    running.submit([(ask("a"), broken), (ask("b", max_new=20), other)])
    assert other.wait().text == alone("b", max_new=20).text
    assert [piece.reason for piece in pieces] == ["", "error"]
    assert running.failed is None and running.running == 0


def test_who_has_its_first_and_last_token_makes_room():
    made, refused, ended = engine(sizes=[1], queue=0), [], threading.Event()

    def again(piece):  # asks on the engine's thread, while the first is being told
        try:
            made.submit([(ask("b", max_new=1), lambda _: ended.set())])
        except Full as full:
            refused.append(full)
            ended.set()

    made.start()
    made.submit([(ask("a", max_new=1), again)])
    assert ended.wait(60) and not refused
    assert made.close(10)


def test_what_never_has_room_is_no_question_of_time():
    with pytest.raises(ValueError, match="3 texts are more"):
        engine(sizes=[1], queue=1).submit([(ask("a"), Answer())] * 3)


@pytest.mark.parametrize("sizes", [[], [0], [4, 2], [2, 2]])
def test_sizes_that_make_no_batches_are_refused(sizes):
    with pytest.raises(ValueError, match="batch sizes"):
        engine(sizes=sizes)


def test_pieces_of_prompts_have_few_lengths():
    short = [16, 32, 64, 96, 128, 160, 192, 224]
    assert slots.lengths(8192) == [*short, 256, 512, 768, 1024] == slots.lengths(1024)
    assert slots.lengths(600) == [*short, 256, 512, 600]
    assert slots.lengths(100) == [16, 32, 64, 96, 100]
    assert slots.lengths(8) == [8]


def test_caches_have_few_reaches_of_which_the_last_is_all():
    assert slots.reaches(100) == [100]
    assert slots.reaches(256) == [128, 256]
    assert slots.reaches(1024) == [128, 256, 512, 1024]
    assert slots.reaches(8192) == [128, 256, 512, 1024, 2048, 4096, 8192]
    assert slots.reaches(300) == [150, 300]


def test_a_prompt_runs_on_the_shortest_cache_that_holds_it(monkeypatch):
    monkeypatch.setattr(slots, "REACH", 8)
    model, params = build()
    rows = slots.Slots(model, params, [1, 2])
    rows.compile()
    before = {key[1:] for key in rows._programs if key[1] == "prefill"}
    assert before == {("prefill", 8, 8)}  # of all the server may need, this is there
    for count, reach in ((8, 8), (9, 16), (17, 32), (CONTEXT, 32)):
        rows.prompt([65] * count, 0)
        assert rows._reach_of_prompt == reach
    # And in one size alone, where the caches of rows always reach over everything.
    alone_B = slots.Slots(model, params, [2])
    alone_B.compile()
    request = ask("ab", max_new=9)
    alone_B.prompt(request.ids, 0)
    assert alone_B._reach_of_prompt == 8 and alone_B._batch.reach == CONTEXT
    _, chosen = alone_B.join(entry(request), "mine", 2)
    written = [int(chosen.token_B[0])]
    written += [int(alone_B.step().token_B[0]) for _ in range(8)]
    assert bytes(written).decode(errors="replace") == alone("ab", max_new=9).text


def test_the_cache_of_a_prompt_grows_with_its_pieces(monkeypatch):
    for name in ("REACH", "PIECE", "SHORTEST"):
        monkeypatch.setattr(slots, name, 8)
    monkeypatch.setattr(slots.prefixes, "BLOCK", 4)
    model, params = build()
    rows = slots.Slots(model, params, [1, 2], prefix_bytes=1 << 20)
    rows.compile()
    rows.ahead()
    before = rows.programs()
    request = ask("a prompt of four pieces, each", max_new=1)
    ids = request.ids
    whole, _ = model.apply({"params": params}, np.array([ids]))

    def run(start):
        seen = []
        while start < len(ids):
            start, *_ = rows.prompt(ids, start)
            seen.append(rows._reach_of_prompt)
        np.testing.assert_allclose(rows._logits[0], whole[0, -1], atol=2e-4)
        return seen

    assert run(0) == [32, 32]  # nobody waits for a token
    rows.join(entry(request), "mine", len(ids))
    assert run(0) == [8, 16, 32, 32]
    rows.remember(ids, 0)
    rows.prompt([65] * 32, 0)  # another, on the same caches
    assert rows.recall([*ids[:9], 0]) == 8 and rows._reach_of_prompt == 16
    rows.prompt([65] * 8, 0)
    assert run(rows.recall(ids)) == [32]
    assert rows.programs() == before  # nothing was left to compile


def test_with_one_size_a_prompt_is_the_same_to_the_bit_whoever_is_there(monkeypatch):
    for name in ("PIECE", "SHORTEST"):
        monkeypatch.setattr(slots, name, 8)
    model, params = build()
    rows = slots.Slots(model, params, [2])
    rows.compile()
    request = ask("a prompt of four pieces, each", max_new=1)

    def run():
        ends = [0]
        while ends[-1] < len(request.ids):
            ends.append(rows.prompt(request.ids, ends[-1])[0])
        return ends, np.asarray(rows._logits)

    ends, alone = run()
    rows.join(entry(request), "mine", len(request.ids))
    again, beside = run()
    assert ends == again == [0, 8, 16, 24, 29]
    np.testing.assert_array_equal(alone, beside)


def test_a_kernel_that_reads_what_is_there_needs_one_cache_for_prompts(monkeypatch):
    if why := native.missing():
        pytest.skip(why)
    for name in ("REACH", "PIECE", "SHORTEST"):
        monkeypatch.setattr(slots, name, 8)
    monkeypatch.setattr(slots.prefixes, "BLOCK", 4)
    monkeypatch.setattr(sample.decode, "LONG", 1)
    model, params = build(head_dim=16)
    rows = slots.Slots(model, params, [1, 2], prefix_bytes=1 << 20)
    assert rows.model.cfg.attention == "native" and rows.reaches == [8, CONTEXT]
    rows.compile()
    rows.ahead()
    before = rows.programs()
    request = ask("a prompt of four", max_new=8)
    ids = request.ids

    def run(start):
        while start < len(ids):
            start, *_ = rows.prompt(ids, start)
        assert rows._reach_of_prompt == CONTEXT
        slot, chosen = rows.join(entry(request), "mine", len(ids))
        written = [int(chosen.token_B[0])]
        written += [int(rows.step().token_B[slot]) for _ in range(7)]
        rows.remember([*ids, *written], slot, rest=True)
        rows.leave(slot)
        rows.fit(0)
        return written

    wanted = sample.texts(
        **{"model": model, "params": params, "tokenizer": TOKENIZER},
        **{"prompts": [ids], "count": 1, "seed": 0, "stop": []},
        **sampling.settings(8, temperature=0.0),
    )[0].ids
    assert run(0) == wanted
    rows.prompt([65] * 20, 0)  # another, on the same cache
    assert rows.recall([*ids[:9], 0]) == 8
    held = len(ids) + 7  # the last token was chosen, and not read
    assert held % 4 and rows.recall([*ids, *wanted, 65, 66]) == held
    assert rows.recall([*ids, *wanted[:6], 0]) == held // 4 * 4
    assert run(rows.recall(ids)) == wanted
    again = [*ids, *wanted, 65]
    start = rows.recall(again)
    rows.prompt(again, start)
    _, chosen = rows.join(entry(ask("x", max_new=9)), "mine", len(again))
    plain, _ = model.apply({"params": params}, np.array([again]))
    assert int(chosen.token_B[0]) == int(plain[0, -1].argmax())
    assert rows.programs() == before  # nothing was left to compile


def test_models_of_one_shape_share_their_programs_and_no_others_do():
    model, params = build()
    shared = compiled.Programs()
    first = slots.Slots(model, params, [2], programs=shared)
    first.compile()
    before = len(shared)
    other = jax.tree.map(lambda x: 2 * x, params)
    second = slots.Slots(model, other, [2], programs=shared)
    second.compile()
    assert len(shared) == before
    request, told = ask("mine", max_new=1), []
    for rows in (first, second):
        rows.prompt(request.ids, 0)
        told.append(int(rows.join(entry(request), "mine", 4)[1].token_B[0]))
    assert told[0] == alone("mine", max_new=1).text.encode()[0] or told[0] > 127
    cfg = tiny.cfg(context_length=CONTEXT, vocab_size=257, n_layers=1)
    params = jax.device_put(models.init(cfg, jax.random.key(0)), jax.devices()[0])
    slots.Slots(models.GPT(cfg), params, [2], programs=shared).compile()
    assert len(shared) == 2 * before


def test_a_turn_of_a_chat_computes_only_what_is_new_in_it(monkeypatch):
    monkeypatch.setattr(prefixes, "BLOCK", 8)
    made = engine(sizes=(1, 2), prefix_bytes=10**6)
    made.start()
    assert made.ready.wait(100)
    first = ask("The quick brown fo", top=0, max_new=6)
    (answer,) = answers(made, [first])
    assert answer.text == alone("The quick brown fo", max_new=6).text
    # 23 tokens have been run, the newest one has not: all of them are kept.
    turn = [*first.ids, *(token.id for token in answer.tokens), *b" so"]
    for cached in (23, 24):  # the second time the turn itself is there too
        before = made.prompted
        (again,) = answers(made, [ask(turn, max_new=4)])
        assert again.text == alone(turn, max_new=4).text
        assert made.prompted - before == len(turn) - cached
    (other,) = answers(made, [ask("The quack brown fo", max_new=6)])
    assert other.text == alone("The quack brown fo", max_new=6).text
    before = made.prompted  # whose tokens' probabilities are wanted runs whole
    answers(made, [ask(turn, score=True, top=0, max_new=0)])
    assert made.prompted - before == len(turn)
    assert made.close(10)


def test_with_one_size_alone_no_beginnings_are_kept():
    """They would make the last bits of a row depend on what was asked before."""
    model, params = build()
    rows = slots.Slots(model, params, [2], prefix_bytes=10**6)
    assert rows._prefixes.most == 0 and rows.recall([65] * 20) == 0


def test_of_beginnings_what_was_not_used_for_longest_goes_first(monkeypatch):
    monkeypatch.setattr(prefixes, "BLOCK", 2)
    kept, block = prefixes.Prefixes(4 * 80), (np.zeros(10), np.zeros(0))
    first, second = prefixes.names([1, 2, 3, 4, 5]), prefixes.names([1, 9, 3, 4])
    assert len(first) == len(second) == 2 and not {*first} & {*second}
    whole = prefixes.names([1, 2, 3, 4, 5], rest=True)
    assert whole == [*first, prefixes.name(first[1], [5])]
    kept.put(first, dict.fromkeys(first, block))
    kept.put(second, dict.fromkeys(second, block))
    assert kept.held == 4 * 80 and len(kept.known(first)) == 2
    third = prefixes.names([7, 7])
    kept.put(third, {third[0]: block})  # the end of what was used least has to go
    assert len(kept.known(second)) == 1 and len(kept.known(first)) == 2
    assert len(kept.known(third)) == 1 and kept.held == 4 * 80
    small = prefixes.Prefixes(100)
    small.put(first, dict.fromkeys(first, block))
    assert small.held <= 100 and len(small.known(first)) == 1


def test_a_program_that_is_wanted_before_it_is_there_is_compiled_once():
    """By whoever comes first: the thread that compiles ahead, or the request."""
    programs, begun, go_on = compiled.Programs(), threading.Event(), threading.Event()

    class Slow:
        """A jitted function whose compilation takes a while, and is counted."""

        count = 0

        def lower(self, *args):
            self.count += 1
            begun.set()
            assert go_on.wait(60)
            return jax.jit(lambda x: x + 1).lower(*args)

    slow = Slow()
    draft = compiled.Draft(("one",), lambda: slow.lower(1))
    thread = threading.Thread(target=programs.ahead, args=([draft],))
    thread.start()
    assert begun.wait(60)
    threading.Timer(0.05, go_on.set).start()
    assert int(programs.call(("one",), slow, 1)) == 2
    thread.join(60)
    assert slow.count == len(programs) == 1


def test_what_cannot_be_compiled_is_an_error_of_who_wants_it_and_tried_again():
    programs = compiled.Programs()

    class Broken:
        def lower(self, *args):
            raise KeyError("no such shape")

    programs.ahead([compiled.Draft(("one",), Broken().lower)])
    good = jax.jit(lambda x: x + 1)
    assert int(programs.call(("one",), good, 1)) == 2
    with pytest.raises(KeyError):
        programs.call(("two",), Broken(), 1)
