# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Rows in PRISM's layout, written by hand: a case for every rule of the converter."""


def person(user_id, religion="No Affiliation", ethnicity="Asian", age="25-34 years old", country="Alba"):
    free = {"self_described": "SELF-DESCRIBED"}
    return {
        "user_id": user_id,
        "survey_only": False,
        "self_description": "SELF-DESCRIBED",
        "system_string": "SELF-DESCRIBED",
        "stated_prefs": {"values": 17},
        "age": age,
        "gender": "Female",
        "education": "Some Primary",
        "employment_status": "Retired",
        "marital_status": "Married",
        "religion": free | {"categorised": "Shinto", "simplified": religion},
        "ethnicity": free | {"categorised": "Black", "simplified": ethnicity},
        "location": {"birth_country": "Belo", "reside_country": country},
    }


PNTS = "Prefer not to say"
SURVEY = [
    person("user0"),
    person("user1", religion=PNTS, ethnicity=PNTS, age=PNTS),
    person("user2"),  # had no conversation
    person("user3", religion=None, ethnicity=None, age=None, country=None)
    | {"gender": PNTS, "education": PNTS, "employment_status": PNTS},
]


def asked(turn, text):
    return {"turn": turn, "role": "user", "content": text}


def answers(turn, *candidates):
    """Candidates: text, score, whether chosen."""
    return [
        {
            "turn": turn,
            "role": "model",
            "content": text,
            "model_provider": "p",
            "model_name": "m",
            "score": score,
            "if_chosen": chosen,
            "within_turn_id": place,
        }
        for place, (text, score, chosen) in enumerate(candidates)
    ]


def conversation(number, user_id, *history, balanced=True):
    entries = [entry for part in history for entry in (part if isinstance(part, list) else [part])]
    return {
        "conversation_id": f"c{number}",
        "user_id": user_id,
        "conversation_type": "unguided",
        "opening_prompt": "not read",
        "open_feedback": "SELF-DESCRIBED",
        "conversation_turns": 2,
        "conversation_history": entries,
        "included_in_balanced_subset": balanced,
    }


def edge_cases():
    return [
        conversation(
            0,
            "user0",
            asked(0, "Hello?"),
            answers(0, ("a0", 17, False), ("b0", 92, True), ("c0", 40, False), ("d0", 5, False)),
            asked(1, "More?"),
            answers(1, ("e0", 70, False), ("f0", 80, True)),
        ),
        conversation(
            1,
            "user1",
            asked(0, "A tie?"),
            answers(0, ("a1", 60, True), ("b1", 60, False), ("c1", 20, False)),
            asked(1, "Twice the same?"),
            answers(1, ("same", 40, True), ("same", 50, True)),
        ),
        conversation(
            2,
            "user3",
            asked(0, "Nothing?"),
            answers(0, ("EMPTY STRING", 1, False), ("b2", 30, True)),
            asked(1, "No choice?"),
            answers(1, ("c2", 10, False), ("d2", 10, False)),
            asked(2, "After?"),
            answers(2, ("e2", 9, True), ("f2", 8, False)),
        ),
        conversation(
            3,
            "user0",
            asked(0, "Against the scores?"),
            answers(0, ("a3", 50, True), ("b3", 60, False), ("c3", 40, False)),
            asked(1, "Two choices?"),
            answers(1, ("d3", 9, True), ("e3", 9, True)),
        ),
        conversation(4, "user9", asked(0, "Who?"), answers(0, ("a4", 9, True), ("b4", 8, False))),
        conversation(5, "user1", asked(0, "EMPTY STRING"), answers(0, ("a5", 9, True), ("b5", 8, False))),
        conversation(
            6,
            "user1",
            asked(0, "HELLO"),  # near-duplicate of conversation 0
            answers(0, ("a6", 9, True), ("b6", 8, False)),
            asked(2, "After a gap?"),
            answers(2, ("c6", 9, True), ("d6", 8, False)),
            balanced=False,
        ),
        conversation(7, "user0", asked(0, "Chose nothing?"), answers(0, ("EMPTY STRING", 9, True), ("b7", 8, False))),
    ]


def metadata():
    def text(column, conversation_id, interaction, language):
        return {
            "column_id": column,
            "user_id": "user0",
            "conversation_id": conversation_id,
            "interaction_id": interaction,
            "utterance_id": None,
            "language_flag": language,
            "moderation_flag": {"flagged": False},
        }

    return [
        text("user_prompt", "c0", "int10", "fr"),  # the second turn: a higher number, though an earlier row
        text("user_prompt", "c0", "int9", "en"),
        text("model_response", "c0", "int9", "de"),
        text("self_description", None, None, "de"),
        text("user_prompt", "c6", "int20", "pt"),
    ]
