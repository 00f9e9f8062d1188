"""Answers are compared in their normal form; prompts and what ends a line are those of the task."""

from pretrain.evals.qa import answer_questions, normal_form
from pretrain.evals.tasks import Question
from pretrain.generate import Completion
from pretrain.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def test_case_punctuation_articles_and_blanks_do_not_count():
    assert normal_form("  The U.S.A.,  an  answer ") == normal_form("usa answer")
    assert normal_form("theatre") != normal_form("atre")


def test_an_answer_that_is_all_article_or_punctuation_is_compared_as_it_is():
    assert normal_form("The The") == normal_form("the  the") != normal_form("")
    assert normal_form(" A ") == "a"
    assert normal_form("!") == "!"
    items = [
        Question(id="0", prompt="x", answers=("A", "")),
        Question(id="1", prompt="y", answers=("The The",)),
    ]
    for texts, wanted in (((" ", ""), (0.0, 0.0)), (("A.", "the the"), (1.0, 1.0))):
        found = answer_questions(Canned(list(texts)), TOKENIZER, items)
        assert tuple(r.metrics["exact_match"] for r in found) == wanted


class Canned:
    """Writes what is given, and keeps what it was asked."""

    def __init__(self, texts):
        self.texts = texts

    def generate(self, requests):
        self.requests = requests
        return [Completion(ids=(), logprobs=(), finish="stop", text=text) for text in self.texts]


def test_an_answer_is_right_when_any_of_the_answers_is_it():
    items = [
        Question(id="1", prompt="Question: x?\nAnswer:", answers=("Paris", "the city of Paris")),
        Question(id="2", prompt="Question: y?\nAnswer:", answers=("Rome",)),
    ]
    writer = Canned([" City of Paris.", " Rome, Italy"])
    first, second = answer_questions(
        writer, TOKENIZER, items, prefix="shots\n\n", add_bos=True, max_new_tokens=7
    )
    assert (first.answer, first.exact, second.exact) == ("City of Paris.", True, False)
    assert first.metrics == {"exact_match": 1.0}
    request = writer.requests[0]
    assert request.ids == (TOKENIZER.bos_id, *TOKENIZER.encode("shots\n\nQuestion: x?\nAnswer:"))
    assert (request.temperature, request.max_new_tokens, request.stop) == (0.0, 7, ("\n",))
    assert request.stop_ids == (TOKENIZER.eos_id,)


def test_an_answer_ends_where_its_task_says():
    item = Question(id="0", prompt="Q: x?\nA:", answers=("Paris",), stop=("\n", ".", ","))
    writer = Canned([" Paris"])
    answer_questions(writer, TOKENIZER, [item])
    assert writer.requests[0].stop == ("\n", ".", ",")
