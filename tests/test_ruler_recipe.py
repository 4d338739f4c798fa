"""The recipe ruler: its prompts hold what they ask for, its scores count that, and what is asked is not asked again."""

import json
import re
from collections import Counter
from random import Random
from statistics import fmean

import pytest

pytest.importorskip("transformers", minversion="5.17")

from flash_entmax.programs.cli import main
from flash_entmax.programs.recipes.adapt import models as adapt_models
from flash_entmax.programs.recipes.adapt.models import tiny_model
from flash_entmax.programs.recipes.ruler import counted, haystack, plan, report, tasks, words
from flash_entmax.programs.recipes.ruler.answers import score, written_behind
from flash_entmax.programs.recipes.ruler.question import MOST_PIECES
from flash_entmax.programs.recipes.ruler.tasks import TASKS, as_prompt, generate, token_ids

BYTES = tiny_model()[1]
NEEDLE = re.compile(r"The secret number of (\S+) is (\d{7})\.")
PROSE = "The keeper of the light writes down every ship. Nobody reads it, and the ink fades. "


def run(out, *options):
    return main(["recipe", "ruler", "--size", "toy", "--device", "cpu", "--out", str(out), *options])


def solved(task: str, prompt: str) -> list[str]:
    """The answers, worked out from the prompt alone."""
    text, question = prompt.split("\n\n")[-2:]
    if task == "variables":
        values = {}
        for name, number, other in re.findall(r"VAR (\w{5}) = (?:(\d+)|VAR (\w+))\.", text):
            values[name] = number or values[other]
        asked = re.search(r"have the value (\d+)", question)[1]
        return [name for name, value in values.items() if value == asked]
    if task.endswith("words"):
        often = Counter(text.rstrip(".").split(", ")).most_common()
        count = int(re.search(r"Which (\d) words", question)[1])
        assert often[count - 1][1] > often[count][1], "there is one answer only"
        return [word for word, _ in often[:count]]
    asked = re.search(r"secret numbers? of (.*) in the text\?", question)[1]
    return [number for name, number in NEEDLE.findall(text) if name in re.split(r", | and ", asked)]


class Oracle:
    """In place of a model: it works out the answers, or writes what it is told to."""

    def __init__(self, says=None):
        self.says, self.asked = says, []

    def __call__(self, model, tokenizer, prompts, room):
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        self.asked += texts
        if self.says is not None:
            return [self.says] * len(texts)
        return [" ".join(solved(task_of(text), text)) for text in texts]


def task_of(prompt: str) -> str:
    return "variables" if "VAR" in prompt else "words" if "this list" in prompt else "needle"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1200, 3000])
def test_prompts_hold_what_they_ask_for(task, length):
    """The answers can be worked out, and the tokens are as many as the length allows, within a word or a sentence."""
    slack = 60 if task == "needle-among-needles" else 16
    for seed in range(4):
        prompt, answers = generate(task, BYTES, length, seed)
        assert sorted(solved(task, prompt)) == sorted(answers)
        assert 0 <= length - TASKS[task].room - len(token_ids(BYTES, prompt)) < slack
        assert (prompt, answers) == generate(task, BYTES, length, seed)
    assert prompt != generate(task, BYTES, length, seed + 1)[0]


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_asks_the_same_at_every_length(task):
    short, long = (generate(task, BYTES, length, 3) for length in (1200, 4096))
    assert short[1] == long[1]
    assert short[0].split("\n\n")[-1] == long[0].split("\n\n")[-1]
    assert len(short[0]) < len(long[0]) / 2


def test_needles_are_of_the_kind_that_the_task_says():
    counts = {"needle": (1, 1), "needle-keys": (4, 4), "needle-values": (1, 4), "needle-queries": (4, 4)}
    for task, (names, needles) in counts.items():
        found = NEEDLE.findall(generate(task, BYTES, 2048, 0)[0])
        assert (len({name for name, _ in found}), len(set(found)), len(found)) == (names, needles, needles)
    prompt, _ = generate("needle-among-needles", BYTES, 2048, 0)
    text = prompt.split("\n\n")[1]
    assert NEEDLE.sub("", text).strip() == "", "nothing but needles"
    found = NEEDLE.findall(text)
    assert len({name for name, _ in found}) == len(found) > 20


def test_needles_are_hidden_at_even_depths():
    depths = []
    for seed in range(400):
        question = TASKS["needle"].question(Random(seed), haystack.NOISE)
        text = question.message(300).split("\n\n")[1]
        depths.append(text.index(question.answers[0]) / len(text))
    quarters = Counter(int(4 * depth) for depth in depths)
    assert all(70 < quarters[quarter] < 130 for quarter in range(4)), quarters
    assert fmean(depths) == pytest.approx(0.5, abs=0.05)


def test_sentences_are_hidden_behind_sentences():
    pieces = ["It", "rains.", "It", "snows.", "It"]
    for depth, text in (
        (0.0, "A. It rains. It snows. It"),
        (0.5, "It rains. A. It snows. It"),
        (0.9, "It rains. It snows. A. It"),
    ):
        assert haystack.hidden(["A."], [depth], pieces) == text
    assert haystack.hidden(["A.", "B."], [0.5, 0.6], pieces) == "It rains. A. B. It snows. It"
    assert haystack.hidden(["A."], [0.9], []) == "A."


def test_words_by_frequency():
    for count in (*range(counted.FEWEST, 500), 100_000):
        often = counted.often_of(count)
        assert sum(often) == count
        assert often[1] > often[2] > often[3]
        assert often == sorted(often, reverse=True)
    assert len(counted.often_of(MOST_PIECES)) < counted.COINED
    assert often[0] / often[1] == pytest.approx(4, rel=1e-3)
    assert often[0] / often[2] == pytest.approx(9, rel=1e-3)


def test_words_are_different():
    for listed in (
        words.ADJECTIVES,
        words.NOUNS,
        words.pairs(Random(0), words.PAIRS),
        words.coined_words(Random(0), 9999),
    ):
        assert len(set(listed)) == len(listed)
    assert {len(word) for word in words.coined_words(Random(1), 50)} == {6}
    assert {len(number) for number in words.numbers(Random(1), 50, 7)} == {7}


def test_the_form_of_a_chat():
    """Its special tokens count, and the answer has begun."""
    _, tokenizer = tiny_model()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[model]{% endif %}"
    )
    assert as_prompt(tokenizer, "Ask.", "I say") == "[user]Ask.[end][model]I say"
    assert as_prompt(BYTES, "Ask.", "I say") == "Ask.\nI say"
    prompt, _ = generate("needle", tokenizer, 1024, 0)
    assert prompt.startswith("[user]A text names")
    assert re.search(r"in the text\?\[end\]\[model\]The secret number of \S+ in the text is$", prompt)
    assert 0 <= 1000 - len(token_ids(tokenizer, prompt)) < 16


def test_scores():
    assert score(["Ab-c", "123"], "") == 0.0
    assert score(["Ab-c", "123"], "it is 0123!") == 0.5
    assert score(["Ab-c", "123"], "AB-C: 123") == 1.0


@pytest.mark.parametrize("attention", ["sdpa", "entmax15"])
def test_a_batch_writes_what_each_prompt_alone_does(attention):
    plan.models_of(plan.RulerSize(is_tiny=True))  # registers
    model = tiny_model(1024)[0].eval()
    model.set_attn_implementation(attention)
    prompts = [token_ids(BYTES, text) for text in ("A bird in the hand", "is worth", "two in the bush, says the book")]
    together = written_behind(model, BYTES, prompts, 8)
    assert together == [written_behind(model, BYTES, [prompt], 8)[0] for prompt in prompts]
    assert len(set(together)) > 1


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("ruler")
    assert run(out) == 0
    return out


def test_the_toy_by_the_command(written):
    results = json.loads((written / "ruler-toy.json").read_text())
    assert results["models"]["tiny"]["attention"] == "softmax"
    assert len(results["runs"]) == 2 * len(TASKS)
    for key, samples in results["runs"].items():
        task, length = re.fullmatch(r"tiny \| (\S+) \| (\d+) tokens", key).groups()
        assert list(samples) == ["0", "1"]
        for seed, found in samples.items():
            assert tuple(found["answers"]) == generate(task, BYTES, int(length), int(seed))[1]
            assert found["score"] == score(found["answers"], found["written"])
            assert found["written"]


def test_what_is_there_is_not_asked_again(written, monkeypatch, capsys):
    oracle = Oracle("nothing")
    monkeypatch.setattr(plan, "written_behind", oracle)
    assert run(written) == 0
    assert oracle.asked == []
    assert "mean of 2 samples" in " ".join(capsys.readouterr().out.split())
    assert run(written, "--samples", "3", "--tasks", "needle", "variables") == 0
    wanted = [generate(task, BYTES, length, 2)[0] for length in (1200, 2048) for task in ("needle", "variables")]
    assert oracle.asked == wanted


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    oracle = Oracle()

    def stops(*arguments):
        if len(oracle.asked) == 4:
            raise KeyboardInterrupt
        return oracle(*arguments)

    monkeypatch.setattr(plan, "written_behind", stops)
    options = "--lengths", "700", "--tasks", "needle", "variables", "needle-keys"
    assert run(tmp_path, *options) == 130
    monkeypatch.setattr(plan, "written_behind", oracle)
    assert run(tmp_path, *options) == 0
    assert len(oracle.asked) == len(set(oracle.asked)) == 6


@pytest.mark.parametrize(("says", "shown", "length"), [(None, "100.0 ± 0.0", "1,200"), ("", "0.0 ± 0.0", "none")])
def test_perfect_and_empty_answers(tmp_path, monkeypatch, capsys, says, shown, length):
    monkeypatch.setattr(plan, "written_behind", Oracle(says))
    assert run(tmp_path, "--lengths", "1100", "1200") == 0
    lines = capsys.readouterr().out.splitlines()
    (mean,) = (line for line in lines if line.startswith("│ mean"))
    assert mean.count(shown) == 2
    assert re.search(rf"│ tiny +│ +{length} │ +{length} │", lines[-3])


def test_effective_length():
    assert report.effective_length({1: 90.0, 2: 85.6, 4: 85.5}, 85.6) == 2
    assert report.effective_length({1: 80.0, 2: 85.6}, 85.6) == 2
    assert report.effective_length({1: 80.0}, 85.6) is None
    assert report.effective_length({1: 0.0, 2: 0.0}, 0.0) is None


def test_folders_with_softmax_and_entmax(tmp_path, monkeypatch, capsys):
    model, tokenizer = tiny_model(2048)
    for name in ("softmax", "entmax"):
        if name == "entmax":
            adapt_models.take_entmax(model, 1.25)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    options = "--samples", "1", "--lengths", "600", "--tasks", "needle"
    folders = "--model", str(tmp_path / "softmax"), str(tmp_path / "entmax")
    used, ask = [], plan.written_behind
    monkeypatch.setattr(plan, "written_behind", lambda model, *rest: used.append(model) or ask(model, *rest))
    assert run(tmp_path, *options, *folders) == 0
    assert [each.config._attn_implementation for each in used] == ["sdpa", "entmax"]
    results = json.loads((tmp_path / "ruler-toy.json").read_text())
    assert [each["attention"] for each in results["models"].values()] == ["softmax", "entmax 1.25"]
    assert "one sample" in " ".join(capsys.readouterr().out.split())
    model.save_pretrained(tmp_path / "softmax")
    assert run(tmp_path, *options, *folders) == 1
    assert f"has results of what was in {tmp_path / 'softmax'} before" in capsys.readouterr().err


def test_prompts_as_a_file(tmp_path, monkeypatch):
    """Of a tokenizer alone; no model is opened, and nothing else is written."""
    monkeypatch.setattr(plan, "ask", None)
    _, tokenizer = tiny_model()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "prompts" / "some.jsonl"
    lengths, some = (1200, 3000), ("needle-values", "common-words")
    options = "--write", str(file), "--model", str(tmp_path / "tokenizer"), "--tasks", *some
    assert run(tmp_path / "out", *options, "--lengths", "700") == 1, "too few tokens for a list of words"
    assert not file.exists()
    assert run(tmp_path / "out", *options, "--lengths", *map(str, lengths)) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    places = [(length, task, seed) for length in lengths for task in some for seed in (0, 1)]
    assert [(row["length"], row["task"], row["seed"]) for row in rows] == places
    for row in rows:
        assert (row["prompt"], tuple(row["answers"])) == generate(row["task"], BYTES, row["length"], row["seed"])
        assert row["room"] == TASKS[row["task"]].room
    assert not (tmp_path / "out").exists()


def test_prose_as_haystack(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(60 * PROSE)
    found = haystack.prose(tmp_path / "a.txt")
    prompt, answers = generate("needle", BYTES, 1024, 0, found)
    assert "Nobody reads it" in prompt
    assert "ferry" not in prompt
    assert solved("needle", prompt) == list(answers)
    assert run(tmp_path, "--text", str(tmp_path / "a.txt"), "--tasks", "needle") == 0
    assert run(tmp_path, "--tasks", "needle") == 1
    assert "take another --out" in capsys.readouterr().err
    (tmp_path / "few.txt").write_text(10 * PROSE)
    assert run(tmp_path / "few", "--text", str(tmp_path / "few.txt"), "--tasks", "needle") == 1
    assert "needle at 1,200 tokens: its text has no more than 160 words" in capsys.readouterr().err
    (tmp_path / "list.txt").write_text(200 * "red green blue ")
    assert run(tmp_path, "--text", str(tmp_path / "list.txt")) == 1
    assert "0 sentences in 600 words are no prose" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--threshold", "0"], "--threshold is per cent, above 0 and at most 100, got 0"),
        (["--threshold", "101"], "--threshold is per cent, above 0 and at most 100, got 101"),
        (["--lengths", "2048", "1024"], "--lengths must be positive and ascend, got 2048 1024"),
        (["--lengths", "0"], "--lengths must be positive and ascend, got 0"),
        (["--lengths", "4096"], "tiny reads up to 2,048 tokens (max_position_embeddings of its config), and 4,096 are"),
        (["--lengths", "128"], "needle needs at least"),
        (["--tasks", "needle", "needle"], "--tasks names something twice: needle needle"),
        (["--model", "/nowhere"], "--model /nowhere: no folder of a model of Transformers"),
        (["--workers", "2"], "ruler asks one model at a time"),
        (["--write", "x", "--threshold", "50"], "--write asks no model: leave --threshold 50 out"),
        (["--write", "x", "--model", "a", "b"], "--write is for one tokenizer, got --model a b"),
        (["--write", "x", "--model", "/nowhere"], "--model /nowhere: its tokenizer"),
        (["--steps", "3"], "--steps is an option of adapt, got ruler"),
    ],
)
def test_what_cannot_run_says_why(tmp_path, capsys, options, message):
    assert run(tmp_path, *options) == 1
    assert message in capsys.readouterr().err


def test_options_of_ruler_belong_to_it(tmp_path, capsys):
    assert main(["recipe", "sort", "--samples", "3", "--out", str(tmp_path)]) == 1
    assert "--samples is an option of ruler, got sort" in capsys.readouterr().err
    assert main(["recipe", "sort", "--lengths", "3", "--out", str(tmp_path)]) == 1
    assert "--lengths is an option of adapt, ruler, got sort" in capsys.readouterr().err
    assert main(["recipe", "adapt", "--model", "a", "b", "--out", str(tmp_path)]) == 1
    assert "adapt takes one --model, got a b" in capsys.readouterr().err


def test_default_lengths(tmp_path):
    """Multiples of 2,048 as far as all models read."""
    from flash_entmax.programs.recipes.ruler.models import Asked, lengths_for

    size = plan.RulerSize()
    assert lengths_for([Asked("one", 9000), Asked("other", None)], size) == (2048, 4096, 8192)
    assert lengths_for([Asked("one", None)], size) == (2048, 4096, 8192, 16_384, 32_768)
    with pytest.raises(plan.CommandError, match="one reads up to 1,024 tokens"):
        lengths_for([Asked("one", 1024)], size)


def test_the_fewest_tokens_of_a_task():
    """A list of words has at least as many others as common words."""
    with pytest.raises(tasks.CommandError) as refused:
        generate("common-words", BYTES, 512, 0)
    fewest = int(re.search(r"needs at least ([\d,]+) tokens", str(refused.value))[1].replace(",", ""))
    prompt, answers = generate("common-words", BYTES, fewest, 0)
    assert len(set(prompt.split("\n\n")[1].rstrip(".").split(", "))) == 2 * len(answers)
    with pytest.raises(tasks.CommandError, match=f"needs at least {fewest:,} tokens with this tokenizer, got"):
        generate("common-words", BYTES, fewest - 1, 0)


def test_padding_without_a_token_for_it():
    _, tokenizer = tiny_model()
    model = tiny_model(256)[0].eval()
    prompts = [token_ids(tokenizer, text) for text in ("one", "one and two")]
    first = written_behind(model, tokenizer, prompts, 4)
    tokenizer.pad_token = None
    assert written_behind(model, tokenizer, prompts, 4) == first
