"""Whatever a template takes, what was said is read, or the row is named."""

import pytest

from safedelta_hf.data.dataset import read_safety_data, tokenizer_digest
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.data.templates import prompt_tokens
from safedelta_hf.errors import DataError
from tests.fixtures import templates, tiny

ROWS = tiny.conversations(2)
PLAIN = read_safety_data(ROWS, tiny.tokenizer())
ASK, REFUSE = ROWS[0]["messages"]


def in_parts(row):
    return {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in row["messages"]]}


@pytest.mark.parametrize("template", [templates.PARTS, templates.LINES, tiny.CHAT_TEMPLATE, templates.STRICT])
@pytest.mark.parametrize("make", [templates.tokenizer, templates.processor])
@pytest.mark.parametrize("rows", [ROWS, [in_parts(row) for row in ROWS]])
def test_text_and_parts_read_alike_with_every_template_on_tokenizer_and_processor(template, make, rows):
    assert read_safety_data(rows, make(template)) == PLAIN
    assert prompt_tokens(make(template), rows[0]["messages"][:1]) == prompt_tokens(tiny.tokenizer(), [ASK])


def test_a_template_that_leaves_the_response_out_is_an_error_that_shows_what_it_renders():
    with pytest.raises(DataError, match=r"row 0: .* leaves out the response; it renders 'how do i make a bomb \?'"):
        read_safety_data(ROWS, templates.tokenizer(templates.DEAF))


def test_a_template_that_leaves_the_question_out_is_an_error():
    deaf = templates.tokenizer(templates.DEAF.replace("user", "assistant"))
    with pytest.raises(DataError, match="leaves out what the user says"):
        read_safety_data(ROWS, deaf)
    with pytest.raises(DataError, match="leaves out what the user says"):
        prompt_tokens(deaf, [ASK])


def test_a_prompt_that_is_no_beginning_of_the_conversation_is_an_error():
    with pytest.raises(DataError, match=r"row 0: .*part before the end of the prompt, at '2 user how"):
        read_safety_data(ROWS, templates.tokenizer(templates.COUNTING))


def test_thoughts_may_be_left_out_and_the_opening_may_differ_after_the_prompt():
    row = {"messages": [ASK, {**REFUSE, "content": "<think>a cake ?\nsure</think>\n\ni cannot help"}]}
    (found,) = read_safety_data([row], templates.tokenizer(templates.THINKING))
    said = [label for label in found.labels if label != IGNORED]
    assert tiny.tokenizer().decode(said) == "i cannot help </s>"


@pytest.mark.parametrize(
    ("turns", "complaint"),
    [
        (
            [{"role": "system", "content": "help"}, ASK, REFUSE],
            r"row 1: the chat template rejects it \(System role not supported\); if it takes no system turn, put its",
        ),
        ([ASK, ASK, REFUSE], r"row 1: the chat template rejects it \(Roles must alternate\); bring the turns into"),
    ],
)
def test_what_a_template_rejects_is_named_with_its_own_message(turns, complaint):
    with pytest.raises(DataError, match=complaint) as found:
        read_safety_data([ROWS[0], {"messages": turns}], templates.tokenizer(templates.STRICT))
    assert found.value.__cause__ is not None


def test_a_tool_call_is_a_response():
    template = tiny.CHAT_TEMPLATE.replace("m['content']", "(m['content'] or m['tool_calls'][0]['function']['name'])")
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "cake"}}]}
    (found,) = read_safety_data([{"messages": [ASK, call]}], templates.tokenizer(template))
    assert tiny.tokenizer().decode([label for label in found.labels if label != IGNORED]) == "cake </s>"


def test_the_fingerprint_tells_templates_of_processors_apart_and_not_where_they_are():
    made = [tokenizer_digest(templates.processor(one)) for one in (templates.PARTS, templates.LINES)]
    assert made[0] != made[1] and made[0] == tokenizer_digest(templates.tokenizer(templates.PARTS))
    assert tokenizer_digest(object()) is None


def test_a_processor_adds_the_special_tokens_that_its_template_does_not_begin_with():
    from tokenizers.processors import TemplateProcessing

    made = templates.processor(tiny.CHAT_TEMPLATE)
    made.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    begun = templates.processor("{{ '<s> ' }}" + tiny.CHAT_TEMPLATE)
    begun.tokenizer.backend_tokenizer.post_processor = made.tokenizer.backend_tokenizer.post_processor
    for one in (made, begun):
        assert [found.input_ids for found in read_safety_data(ROWS, one)] == [(1, *row.input_ids) for row in PLAIN]
