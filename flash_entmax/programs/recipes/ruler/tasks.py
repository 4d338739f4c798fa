"""Long texts with a question at their end, in the manner of RULER (arXiv 2404.06654); all text is our own.

| task | what is asked | RULER's |
|---|---|---|
| needle | the number of a name, which one sentence says | niah_single |
| needle-keys | the same, and three other names have numbers | niah_multikey |
| needle-among-needles | the same, and the whole text consists of such sentences on other names | niah_multikey |
| needle-values | the four numbers of one name | niah_multivalue |
| needle-queries | the numbers of four names | niah_multiquery |
| variables | the five variables of a chain, each assigned the one before | vt |
| common-words | the five words that stand ten times in a list of words | cwe |
| frequent-words | the three most frequent words of a list in which the k-th has the frequency 1/k² | fwe |

RULER lists ten common words thirty times, and the others three times. Here the ratio is the same, and fewer make room
in short texts. RULER's questions from other data sets (qa) are left out, and so are its examples of solved questions.

The last two count words. Every word of such a list matters, so dense attention may have the advantage over sparse.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from ...errors import CommandError
from . import counted, looked_up
from .haystack import NOISE, Haystack
from .question import Question


@dataclass(frozen=True)
class Task:
    """``question`` draws one; ``room`` is how many tokens an answer gets, enough for a tokenizer of bytes."""

    question: Callable[[Random, Haystack], Question]
    room: int


TASKS = {
    "needle": Task(looked_up.needles, 24),
    "needle-keys": Task(partial(looked_up.needles, keys=4), 24),
    "needle-among-needles": Task(looked_up.needle_among_needles, 24),
    "needle-values": Task(partial(looked_up.needles, values=4), 96),
    "needle-queries": Task(partial(looked_up.needles, keys=4, asked=4), 96),
    "variables": Task(looked_up.variables, 64),
    "common-words": Task(counted.common_words, 96),
    "frequent-words": Task(counted.frequent_words, 48),
}


def generate(task: str, tokenizer, length: int, seed: int, haystack: Haystack = NOISE) -> tuple[str, tuple[str, ...]]:
    """A prompt, and the answers that it asks for. The same arguments give the same prompt.

    The same seed asks the same question at every length, at the same relative depths. The prompt ends with the first
    words of an answer, and has the form of a chat if the tokenizer has one.

    Args:
        task: one of TASKS.
        tokenizer: of Transformers.
        length: tokens of the prompt and of the room for the answer, as RULER counts. The text is as long as they allow.
        seed: draws the question and the places.
        haystack: what the text consists of. The tasks that have lists or needles throughout do not use it.

    Raises:
        CommandError: the length has no room for the question, or the haystack has no more words.
    """
    question = TASKS[task].question(Random(f"{task} {seed}"), haystack)
    most = length - TASKS[task].room

    def prompt(pieces: int) -> str:
        return as_prompt(tokenizer, question.message(pieces), question.start)

    def tokens(pieces: int) -> int:
        return len(token_ids(tokenizer, prompt(pieces)))

    counts = range(question.fewest, min(most, question.most) + 1)  # a piece has at least one token
    fitting = bisect_right(counts, most, key=tokens)
    if not fitting:
        fewest = tokens(question.fewest) + TASKS[task].room
        raise CommandError(f"{task} needs at least {fewest:,} tokens with this tokenizer, got {length:,}: --lengths")
    if counts[fitting - 1] == question.most:
        raise CommandError(
            f"{task} at {length:,} tokens: its text has no more than {question.most:,} words or sentences"
        )
    return prompt(counts[fitting - 1]), question.answers


def as_prompt(tokenizer, message: str, start: str) -> str:
    """The message, in the form of a chat if the tokenizer has one, and the start of the answer."""
    if not tokenizer.chat_template:
        return f"{message}\n{start}"
    chat = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + start


def token_ids(tokenizer, prompt: str) -> list[int]:
    """As the model reads it. The form of a chat has its special tokens already."""
    return tokenizer(prompt, add_special_tokens=not tokenizer.chat_template, verbose=False)["input_ids"]
