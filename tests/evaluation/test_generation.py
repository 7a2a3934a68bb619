import pytest
import torch

from safedelta_hf.data.templates import prompt_tokens
from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.evaluation import Questions, evaluate_model, generate_responses, model_digest
from safedelta_hf.testbed import attack_questions, load_aligned, skill_questions
from tests.fixtures import templates, tiny

CHATS = [question.messages for question in (*skill_questions(28), *attack_questions(12))]


@pytest.fixture
def loaded():
    return load_aligned()


@pytest.fixture(scope="module")
def one_by_one():
    return generate_responses(*load_aligned(), CHATS, batch_size=1)


@pytest.mark.parametrize("batch_size", [7, 64])
def test_responses_do_not_depend_on_batch_size_and_padding(loaded, one_by_one, batch_size):
    assert generate_responses(*loaded, CHATS, batch_size=batch_size) == one_by_one


def test_responses_follow_the_order_of_the_chats(loaded, one_by_one):
    assert generate_responses(*loaded, CHATS[::-1]) == one_by_one[::-1]


def test_responses_are_bare_text(one_by_one):
    assert all(response and "<" not in response and response == response.strip() for response in one_by_one)


def test_length_limit_is_kept(loaded):
    assert all(len(response.split()) <= 2 for response in generate_responses(*loaded, CHATS, max_new_tokens=2))


def test_a_processor_that_alone_has_the_template_asks_alike(loaded, one_by_one):
    model, tokenizer = loaded
    processor = templates.Processor(tokenizer, chat_template=tokenizer.chat_template)
    tokenizer.chat_template = None
    assert generate_responses(model, processor, CHATS) == one_by_one


def test_a_chat_that_the_template_rejects_is_named_with_its_message(loaded):
    model, tokenizer = loaded
    tokenizer.chat_template = templates.STRICT
    asked = [{"role": "user", "content": "what is red ?"}]
    system = [{"role": "system", "content": "be brief"}, *asked]
    with pytest.raises(DataError, match=r"conversations\[1\]: .*\(System role not supported\); if it takes no system"):
        generate_responses(model, tokenizer, [asked, system])
    with pytest.raises(DataError, match=r"^harmful: conversations\[0\]: .*System role"):
        evaluate_model(model, tokenizer, Questions.read(harmful=[{"messages": system}]), progress=False)


def test_no_chats_give_no_responses(loaded):
    assert generate_responses(*loaded, []) == []


def unusual_state(model, tokenizer):
    model.train()
    model.model.layers[1].eval()
    model.config.use_cache = False
    tokenizer.padding_side = "right"


def state(model, tokenizer):
    modes = [module.training for module in model.modules()]
    return modes, model.config.use_cache, tokenizer.padding_side, torch.is_grad_enabled()


def test_state_is_restored(loaded, one_by_one):
    unusual_state(*loaded)
    before = state(*loaded)
    assert generate_responses(*loaded, CHATS) == one_by_one
    assert state(*loaded) == before


def test_state_is_restored_after_an_error(loaded, monkeypatch):
    model, tokenizer = loaded
    unusual_state(model, tokenizer)
    before = state(model, tokenizer)

    def fail(**kwargs):
        assert tokenizer.padding_side == "left"
        assert not any(module.training for module in model.modules())
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate_responses(model, tokenizer, CHATS)
    assert state(model, tokenizer) == before


def test_bad_settings_are_refused(loaded):
    model, tokenizer = loaded
    with pytest.raises(ConfigurationError, match="batch_size"):
        generate_responses(model, tokenizer, CHATS, batch_size=0)
    with pytest.raises(ConfigurationError, match="max_new_tokens"):
        generate_responses(model, tokenizer, CHATS, max_new_tokens=0)
    tokenizer.chat_template = None
    with pytest.raises(ConfigurationError, match="chat template"):
        generate_responses(model, tokenizer, CHATS)


def test_a_tokenizer_without_padding_token_is_refused(loaded):
    model, tokenizer = loaded
    tokenizer.pad_token = None
    with pytest.raises(ConfigurationError, match="padding token"):
        generate_responses(model, tokenizer, CHATS)


@pytest.mark.parametrize("chat", [[], [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])
def test_chats_that_do_not_end_in_a_user_turn_are_refused(loaded, chat):
    with pytest.raises(DataError, match=r"conversations\[1\]"):
        generate_responses(*loaded, [CHATS[0], chat])


def test_decoding_is_greedy_whatever_the_models_own_settings_say(loaded, one_by_one):
    model, tokenizer = loaded
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=2, num_beams=3, do_sample=True)
    settings = model.generation_config
    assert generate_responses(model, tokenizer, CHATS) == one_by_one
    assert model.generation_config is settings and settings.num_beams == 3


def test_responses_end_at_the_tokenizers_end_of_turn_whatever_the_model_names(loaded, one_by_one):
    model, tokenizer = loaded
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("lake")
    assert tokenizer.eos_token_id != model.generation_config.eos_token_id
    responses = generate_responses(model, tokenizer, CHATS)
    assert [text for text, known in zip(responses, one_by_one, strict=True) if "lake" not in known] == [
        known for known in one_by_one if "lake" not in known
    ]


def test_known_responses_are_kept_and_batches_stay_whole(loaded, one_by_one, monkeypatch):
    model, tokenizer = loaded
    sizes, made, generate = [], {}, model.generate

    def counted(**arguments):
        sizes.append(len(arguments["input_ids"]))
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", counted)
    longest_first = sorted(range(len(CHATS)), key=lambda n: -len(prompt_tokens(tokenizer, CHATS[n])))
    known = dict.fromkeys(longest_first[:10], "known before")
    responses = generate_responses(model, tokenizer, CHATS, batch_size=7, known=known, on_batch=made.update)
    assert sizes == [7, 7, 7, 7, 5]  # of 40 chats the first batch is known whole, the second in part
    assert made == {index: text for index, text in enumerate(one_by_one) if index not in known}
    assert responses == [known.get(index, text) for index, text in enumerate(one_by_one)]


def adapted(**settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(
        tiny.llama(), LoraConfig(**{"target_modules": ["q_proj"], "r": 4, "lora_alpha": 8} | settings)
    )


def test_equal_models_are_equal_wherever_they_are(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    used = tiny.llama().train()
    used.config.use_cache = False
    assert model_digest(tiny.llama(), None) == model_digest(tiny.loaded(tmp_path), None) == model_digest(used, None)


@pytest.mark.parametrize("change", ["weight", "dtype", "configuration", "tokenizer"])
def test_what_changes_the_responses_changes_the_digest(change):
    model, tokenizer = tiny.llama(), tiny.tokenizer()
    before = model_digest(model, tokenizer)
    if change == "weight":
        model.lm_head.weight.data[0, 0] += 1e-3
    elif change == "dtype":
        model = model.bfloat16()
    elif change == "configuration":
        model.config.rope_parameters["rope_theta"] = 5.0
    else:
        tokenizer.chat_template += " "
    assert model_digest(model, tokenizer) != before


def test_adapters_count_with_their_scaling_and_whether_they_are_on():
    digests = [model_digest(model, None) for model in (tiny.llama(), adapted(), adapted(lora_alpha=16))]
    two = adapted()
    two.add_adapter("other", two.peft_config["default"])
    digests.append(model_digest(two, None))
    two.set_adapter("other")
    digests.append(model_digest(two, None))
    assert len(set(digests)) == len(digests)


def test_a_saved_adapter_is_the_same_when_it_is_loaded(tmp_path):
    from peft import PeftModel

    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert model_digest(loaded, None) == model_digest(again, None)


def test_offloaded_weights_are_refused():
    with pytest.raises(ConfigurationError, match="weights are offloaded"):
        model_digest(tiny.llama().to("meta"), None)
