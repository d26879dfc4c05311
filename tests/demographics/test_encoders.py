# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import copy
import itertools
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys

import pytest
import torch

from trl_cuma.demographics import DemographicProfile, FieldEncoder, TextEncoder, encoder_from_state

SECRET = "Xyzzyland"  # stands for a person's value: it must not show up anywhere
PEOPLE = [
    {"country": country, "religion": religion, "age": age, "sex": sex}
    for country, religion, age, sex in itertools.product(
        ["Japan", "Brazil", "Kenya"], ["Muslim", "Roman Catholic", "none"], ["16-24 years", "65 and over"], ["F", "M"]
    )
]  # 36 profiles


def mean_cosine(vectors):
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    return (vectors @ vectors.T)[~torch.eye(len(vectors), dtype=torch.bool)].mean().item()


@pytest.fixture(scope="module")
def encoder(minilm_path):
    return TextEncoder(str(minilm_path), batch_size=8).fit(PEOPLE)


@pytest.fixture(scope="module")
def vectors(encoder):
    return encoder.encode(PEOPLE)


class TestTextEncoder:
    def test_standardised_over_the_training_profiles(self, encoder, vectors):
        assert vectors.shape == (36, 384) and vectors.dtype == torch.float32 and encoder.dim == 384
        torch.testing.assert_close(vectors.mean(0), torch.zeros(384), rtol=0, atol=1e-5)
        torch.testing.assert_close(vectors.square().mean(), torch.tensor(1.0), rtol=1e-5, atol=0)

    def test_centring_removes_the_common_component(self, minilm_path, vectors):
        from sentence_transformers import SentenceTransformer

        texts = [DemographicProfile.from_value(person).text for person in PEOPLE]
        raw = SentenceTransformer(str(minilm_path), device="cpu").encode(texts, convert_to_tensor=True)
        # Centred, the expected cosine of two of n unit-like vectors is -1/(n-1) = -0.03.
        assert mean_cosine(raw) > 0.5
        assert abs(mean_cosine(vectors)) < 0.05
        # The transformation is affine with one scale: it is the raw embedding up to shift and scale.
        centred = raw - raw.mean(0)
        torch.testing.assert_close(vectors, centred / centred.square().mean().sqrt(), rtol=0, atol=1e-4)

    def test_uncentred_keeps_the_common_component_on_the_same_scale(self, minilm_path):
        uncentred = TextEncoder(str(minilm_path), centre=False).fit(PEOPLE)
        raw = uncentred.encode(PEOPLE)
        assert mean_cosine(raw) > 0.5
        torch.testing.assert_close(raw.square().mean(), torch.tensor(1.0), rtol=1e-5, atol=0)
        restored = encoder_from_state(uncentred.state())
        torch.testing.assert_close(restored.encode(PEOPLE[:3]), raw[:3], rtol=0, atol=1e-6)

    def test_independent_of_batch_mates(self, encoder, vectors):
        alone = torch.cat([encoder.encode([person]) for person in PEOPLE[::5]])
        torch.testing.assert_close(alone, vectors[::5], rtol=0, atol=1e-5)
        # On the scale of the raw embeddings (unit length), as vectors are raw / rms:
        assert ((alone - vectors[::5]) * encoder.state()["rms"]).abs().max() <= 1e-6
        long_mate = "A very long text. " * 20
        torch.testing.assert_close(encoder.encode([long_mate, PEOPLE[0]])[1], vectors[0], rtol=0, atol=1e-5)

    def test_no_batch_is_padded(self, encoder, monkeypatch):
        from sentence_transformers import SentenceTransformer

        shapes, forward = [], SentenceTransformer.forward

        def spy(model, features, **kwargs):
            assert features["attention_mask"].all()
            shapes.append(tuple(features["input_ids"].shape))
            return forward(model, features, **kwargs)

        monkeypatch.setattr(SentenceTransformer, "forward", spy)
        with pytest.warns(UserWarning, match="2 of 15 profiles are longer"):
            encoder.encode([" ".join(["word"] * n) for n in (1, 5, 2, 9, 300, 400)] + [f"word {i}" for i in range(9)])
        # [CLS] and [SEP] are two tokens more; 300 and 400 words are cut to 256; batches hold 8 texts at most.
        assert sorted(shapes) == sorted([(1, 3), (1, 7), (8, 4), (2, 4), (1, 11), (2, 256)])

    def test_order_and_repetition_do_not_change_the_fit(self, encoder, minilm_path):
        shuffled = PEOPLE * 2 + [None, PEOPLE[0], {"age": "No answer"}]
        random.Random(0).shuffle(shuffled)
        again = TextEncoder(str(minilm_path), batch_size=8).fit(shuffled, person_ids=[0] * len(shuffled))
        assert again.state() == encoder.state()

    def test_state_survives_json(self, encoder, vectors):
        state = json.loads(json.dumps(encoder.state()))
        restored = encoder_from_state(state)
        assert isinstance(restored, TextEncoder) and restored.is_fitted
        assert restored.dim == 384 and restored.fingerprint == encoder.fingerprint == state["fingerprint"]
        assert torch.equal(restored.encode(PEOPLE[:5]), encoder.encode(PEOPLE[:5]))
        torch.testing.assert_close(restored.encode(PEOPLE), vectors, rtol=0, atol=1e-5)

    def test_state_describes_the_encoder(self, encoder):
        state = encoder.state()
        assert state["type"] == "text" and state["template"] == "{text}" and state["max_seq_length"] == 256
        assert state["revision"].startswith("sha256:") and len(state["revision"]) == len("sha256:") + 64
        assert state["pooling"].startswith("Transformer > Pooling(") and "mean" in state["pooling"]
        assert len(state["mean"]) == 384 and "Japan" not in json.dumps(state)

    def test_missing_is_the_average_profile(self, encoder, vectors):
        people = [PEOPLE[3], None, {"country": "No answer"}]
        out = encoder.encode(people, missing="zero")
        torch.testing.assert_close(out[0], vectors[3], rtol=0, atol=1e-5)
        assert not out[1:].any()
        with pytest.raises(ValueError, match=r"Nothing is known about the person in rows 1, 2: "):
            encoder.encode(people)
        assert encoder.encode([]).shape == (0, 384)

    def test_template_changes_the_vectors(self, encoder, minilm_path):
        other = TextEncoder(str(minilm_path), template="What would {text} say? {braces}").fit(PEOPLE[:4])
        restored = encoder_from_state(other.state())
        assert torch.equal(restored.encode(PEOPLE[:1]), other.encode(PEOPLE[:1]))
        assert not torch.allclose(other.encode(PEOPLE[:1]), encoder.encode(PEOPLE[:1]), atol=0.1)
        with pytest.raises(ValueError, match="it must contain {text}"):
            TextEncoder(template="profile")

    def test_half_precision_models_run_in_fp32(self, minilm_path, tmp_path):
        from sentence_transformers import SentenceTransformer

        SentenceTransformer(str(minilm_path), device="cpu").bfloat16().save(str(tmp_path / "half"))
        vectors = TextEncoder(str(tmp_path / "half")).fit(PEOPLE[:4]).encode(PEOPLE[:4])
        upcast = SentenceTransformer(str(tmp_path / "half"), device="cpu", model_kwargs={"dtype": torch.float32})
        texts = [DemographicProfile.from_value(person).text for person in PEOPLE[:4]]
        raw = upcast.encode(texts, convert_to_tensor=True)
        centred = raw - raw.mean(0)
        torch.testing.assert_close(vectors, centred / centred.square().mean().sqrt(), rtol=0, atol=1e-4)

    def test_changed_weights_are_refused(self, encoder, minilm_path, tmp_path):
        folder = tmp_path / "model"
        shutil.copytree(minilm_path, folder)
        moved = encoder_from_state(encoder.state())
        moved.model = str(folder)
        assert torch.equal(moved.encode(PEOPLE[:2]), encoder.encode(PEOPLE[:2]))  # moved, with the same content
        weights = folder / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        changed = encoder_from_state(encoder.state())
        changed.model = str(folder)
        with pytest.raises(ValueError, match="has content sha256:.* expected revision sha256:.*fit a new encoder"):
            changed.encode(PEOPLE[:2])
        changed.model = str(tmp_path / "gone")
        with pytest.raises(ValueError, match="gone is not a folder: set `encoder.model`"):
            changed.encode(PEOPLE[:2])

    def test_too_long_profiles_warn_without_their_text(self, encoder):
        with pytest.warns(
            UserWarning, match="1 of 2 profiles are longer than the model's max_seq_length=256"
        ) as caught:
            encoder.encode([f"{SECRET} " * 300, PEOPLE[0]])
        assert not any(SECRET in str(warning.message) for warning in caught)

    def test_copies_are_equal_and_light(self, encoder, vectors):
        assert len(pickle.dumps(encoder)) < 100_000  # the model has 90 MB
        torch.testing.assert_close(copy.deepcopy(encoder).encode(PEOPLE[:2]), vectors[:2], rtol=0, atol=1e-5)

    def test_progress_counts_unique_profiles(self, encoder, capsys):
        encoder.encode([PEOPLE[0]] * 3 + [{"name": SECRET}], show_progress=True)
        shown = capsys.readouterr()
        assert "2/2" in shown.err and SECRET not in shown.err + shown.out

    @pytest.mark.parametrize(
        ("people", "count"), [([], 0), ([PEOPLE[0], dict(reversed(PEOPLE[0].items()))], 1), ([None, {"a": "n/a"}], 0)]
    )
    def test_fit_needs_two_distinct_profiles(self, people, count):
        with pytest.raises(ValueError, match=f"got {count} distinct known profiles to fit on and needs at least 2"):
            TextEncoder().fit(people)

    def test_missing_package_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(ImportError, match=r"pip install 'trl_cuma\[text-encoder\]'"):
            TextEncoder().fit(PEOPLE)

    @pytest.mark.slow
    def test_hub_model_in_a_fresh_process(self, minilm_path, vectors, tmp_path):
        """A hub id becomes its commit, and another process computes the same vectors."""
        commit = "0123456789abcdef0123456789abcdef01234567"
        repo = tmp_path / "models--org--minilm"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        (repo / "snapshots").mkdir()
        (repo / "snapshots" / commit).symlink_to(minilm_path, target_is_directory=True)
        script = (
            "import json, sys\n"
            "from trl_cuma.demographics import TextEncoder\n"
            "people = json.load(sys.stdin)\n"
            "encoder = TextEncoder('org/minilm', batch_size=8).fit(people)\n"
            "state = encoder.state()\n"
            "again = TextEncoder.from_state(state).encode(people[:3])\n"
            "print(json.dumps([state, again.tolist()]))\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", script],
            input=json.dumps(PEOPLE),
            env=os.environ
            | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        state, again = json.loads(result.stdout.splitlines()[-1])
        assert state["model"] == "org/minilm" and state["revision"] == commit
        torch.testing.assert_close(torch.tensor(again), vectors[:3], rtol=0, atol=1e-5)


class TestFieldEncoder:
    @pytest.fixture
    def encoder(self):
        return FieldEncoder(min_count=2).fit(
            [
                {"country": "JP", "sex": "F"},
                {"country": "JP", "sex": "M"},
                {"country": "BR", "sex": "F", "age": None},
                {"country": "BR", "religion": SECRET},
                {"country": SECRET},
                None,
            ]
        )

    def test_multi_hot_over_sorted_pairs(self, encoder):
        # Shared by two people: country BR, country JP, sex F. Not: country Xyzzyland, religion Xyzzyland, sex M.
        assert encoder.state()["vocabulary"] == {"country": ["BR", "JP"], "sex": ["F"]}
        assert encoder.dim == 3
        people = [{"sex": "F", "country": "JP"}, {"country": "BR", "sex": "M"}, {"country": SECRET}, {"sex": " F "}]
        expected = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.float32)
        # 3 dimensions of 2 fields: a complete profile has the sum of squares 2 * 3 / 2 = dim, a root mean square of 1
        torch.testing.assert_close(encoder.encode(people), expected * math.sqrt(3 / 2))
        assert encoder.encode(people[:1]).square().mean().item() == pytest.approx(1.0)
        assert encoder.encode([]).shape == (0, 3)

    def test_rare_values_are_not_stored(self, encoder):
        assert SECRET not in json.dumps(encoder.state())
        assert SECRET.encode() not in pickle.dumps(encoder)

    def test_counts_people_not_rows(self):
        people = [{"country": "JP"}] * 3 + [{"country": "BR"}] * 3
        encoder = FieldEncoder(min_count=2).fit(people, person_ids=["a", "a", "a", "b", "b", "c"])
        assert encoder.state()["vocabulary"] == {"country": ["BR"]}
        with pytest.raises(ValueError, match="`person_ids` has 2 entries for 6 profiles"):
            FieldEncoder(min_count=2).fit(people, person_ids=["a", "b"])

    def test_default_keeps_values_of_thirty_people(self):
        people = [{"country": "JP"}] * 30 + [{"country": "BR"}] * 29
        assert FieldEncoder().fit(people).state()["vocabulary"] == {"country": ["JP"]}

    def test_order_of_the_people_does_not_matter(self):
        people = [{"country": country, "age": age} for country in "CAB" for age in (30, "20", 40.0)]
        states = [FieldEncoder(min_count=1).fit(rows).state() for rows in (people, people[::-1])]
        assert states[0] == states[1]
        assert states[0]["vocabulary"] == {"age": ["20", "30", "40"], "country": ["A", "B", "C"]}

    def test_everything_rare_is_an_error(self):
        with pytest.raises(
            ValueError, match=r"fields \['country', 'sex'\] is shared by min_count=30 people"
        ) as caught:
            FieldEncoder().fit([{"country": SECRET, "sex": "F"}] * 29)
        assert SECRET not in str(caught.value)

    def test_state_survives_json(self, encoder):
        state = json.loads(json.dumps(encoder.state()))
        # A file may keep its keys in another order.
        state["vocabulary"] = dict(reversed(state["vocabulary"].items()))
        restored = encoder_from_state(state)
        assert isinstance(restored, FieldEncoder) and restored.fingerprint == encoder.fingerprint
        people = [{"country": "JP", "sex": "F"}, {"country": "BR"}]
        assert torch.equal(restored.encode(people), encoder.encode(people))

    def test_missing(self, encoder):
        # Row 2 lists the encoder's field without knowing it, what else is known does not reach the vector.
        people = [{"country": "JP"}, None, {"country": None, "hobby": "chess"}]
        assert torch.equal(encoder.encode(people, missing="zero")[1:], torch.zeros(2, 3))
        with pytest.raises(ValueError, match="Nothing is known about the person in rows 1, 2: "):
            encoder.encode(people)
        with pytest.raises(ValueError, match="`missing` is 'mean'"):
            encoder.encode(people, missing="mean")

    @pytest.mark.parametrize("missing", ["error", "zero"])
    def test_wrong_column(self, encoder, missing):
        message = r"in row 1 has none of the encoder's fields \['country', 'sex'\], it has \['land'\]"
        with pytest.raises(ValueError, match=message) as caught:
            encoder.encode([{"country": "JP"}, {"land": SECRET}], missing=missing)
        assert SECRET not in str(caught.value)

    @pytest.mark.parametrize("method", ["fit", "encode"])
    def test_plain_text_is_refused(self, encoder, method):
        with pytest.raises(ValueError, match="row 1 is a plain text: the FieldEncoder needs a mapping") as caught:
            getattr(encoder, method)([{"country": "JP"}, f"country: {SECRET}"])
        assert SECRET not in str(caught.value)

    @pytest.mark.parametrize("min_count", [0, -1, 2.5, True, "3"])
    def test_bad_min_count(self, min_count):
        with pytest.raises(ValueError, match="`min_count` is .*expected an integer of at least 1"):
            FieldEncoder(min_count=min_count)


@pytest.mark.parametrize("encoder", [FieldEncoder(), TextEncoder()], ids=lambda encoder: type(encoder).__name__)
def test_unfitted(encoder):
    assert not encoder.is_fitted
    for use in (lambda: encoder.encode([{"country": "JP"}]), encoder.state, lambda: encoder.fingerprint):
        with pytest.raises(RuntimeError, match=r"is not fitted: call fit\(training profiles\) or use from_state"):
            use()


def test_unfitted_field_encoder_has_no_dim():
    with pytest.raises(RuntimeError, match="is not fitted"):
        _ = FieldEncoder().dim


def test_rows_are_named_and_a_single_profile_is_refused():
    encoder = FieldEncoder(min_count=1).fit([{"country": "JP"}])
    with pytest.raises(TypeError, match="Row 1: The field 'home' of a demographic profile is a dict"):
        encoder.encode([{"country": "JP"}, {"home": {"country": SECRET}}])
    for one in ({"country": SECRET}, SECRET):
        with pytest.raises(TypeError, match=r"Expected a sequence of demographic profiles, got \w+: pass \[profile\]"):
            encoder.encode(one)
    with pytest.raises(ValueError, match="in rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"):
        encoder.encode([None] * 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_count": 1}, "does not match its fingerprint"),
        ({"vocabulary": {"country": ["BR"]}}, "does not match its fingerprint"),
        ({"fingerprint": "0" * 64}, "does not match its fingerprint"),
        ({"type": "hash"}, 'has type \'hash\', expected "text" or "field"'),
        ({"extra": 1}, r"lacks \[\] and has unknown keys \['extra'\]"),
        ({"type": "text"}, r"lacks \['dim', 'max_seq_length', 'mean', .*unknown keys \['min_count', 'vocabulary'\]"),
    ],
)
def test_changed_states_are_refused(change, message):
    state = FieldEncoder(min_count=2).fit([{"country": "JP"}] * 2).state()
    with pytest.raises(ValueError, match=message):
        encoder_from_state(state | change)


def test_state_is_a_copy():
    encoder = FieldEncoder(min_count=1).fit([{"country": "JP"}])
    encoder.state()["vocabulary"]["country"].append("FR")
    assert encoder.state()["vocabulary"] == {"country": ["JP"]}
