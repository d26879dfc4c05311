# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A made-up evaluation with everything that a document can hold, and names that are hard to show."""

from __future__ import annotations

from typing import Any

import numpy as np

GROUPS = ["Arvenia", "Bosk & Törv", "<b>Cintra</b>", "$Delmar$", "The United Republic of Eastern Fenwick", "Other"]
QUESTIONS = ["How important is family in your life?", "Is it justifiable to avoid a fare on public transport?"]
# Groups, routers and panels: the fewest that every figure can be drawn of, and as many as people's reports have.
SIZES = {"small": (4, 3, 4), "large": (6, 8, 12)}
ATTACK = '"><script>document.title="attacked"</script>'


def evaluation(num_groups: int = 4, num_routers: int = 3, num_panels: int = 4) -> dict[str, Any]:
    """An evaluation of two splits, with answers, topology and training."""
    rng = np.random.default_rng(0)
    return {
        "version": 1,
        "model": {
            "name": "models/tiny-base",
            "adapter": "runs/cuma",
            "parameters_trained": 1_234_567,
            "prompt_profile": False,
        },
        "splits": {
            "test": _split(rng, num_panels),
            "held-out countries": {"counts": {"rows": 12}, "metrics": _metrics(0.02)},
        },
        "generation": {"own_choices": {"test": _own_choices()}, "answers": {"test": _answers()}},
        "topology": _topology(rng, num_groups, num_routers),
        "training": {
            "log_history": [
                *({"step": step, "loss": 0.6 + 1.2 * 0.98**step} for step in range(10, 210, 10)),
                *({"step": step, "eval_loss": 0.7 + 1.1 * 0.98**step} for step in range(50, 210, 50)),
            ]
        },
    }


def _metrics(shift: float) -> dict[str, Any]:
    unit = "person × question"
    return {
        "accuracy": {"value": 0.5417 - shift, "low": 0.5203, "high": 0.5631, "n": 812, "unit": unit},
        "emd": {"value": 0.10349 + shift, "low": 0.0912, "high": 0.1147, "marginal": 0.1761}
        | {"n": 96, "unit": "country × question"},
        "kl_explained": {"value": 0.412 - shift, "low": 0.371, "high": 0.449, "n": 96, "unit": "country × question"},
        "nll": {"value": 1.1, "low": 1.05, "high": 1.15, "n": 812, "unit": unit},
        "wvb_emd": {"value": 0.055, "low": None, "high": None, "n": 36, "unit": "question"},
        "collapse_index": {
            "value": None,
            "low": None,
            "high": None,
            "n": 96,
            "unit": "question",
            "note": "the lower bound of its denominator, 0.031 nats, is under 0.05",
        },
        "outside": {"value": 0.00012, "low": 0.0001, "high": 0.00014, "n": 96, "unit": "question"},
    }


def _own_choices() -> dict[str, Any]:
    names = {"pair_accuracy": 0.5712, "pair_accuracy_per_token": 0.5534, "pair_accuracy_longer": 0.588}
    names |= {"choice_accuracy": 0.331, "choice_accuracy_per_token": 0.322, "choice_chance": 0.262}
    return {
        "counts": {
            "rows": 3120,
            "choices": 1050,
            "pairs": 3101,
            "people": 141,
            "prompts": 998,
            "ties": 2,
            "bad_rows": {"longer than the model's context": 19},
        },
        "metrics": {
            name: {"value": value, "low": value - 0.02, "high": value + 0.02, "n": 141, "unit": "person × prompt"}
            for name, value in names.items()
        },
    }


def _answers() -> dict[str, Any]:
    def rate(value: float, n: int, unit: str = "comparison") -> dict[str, Any]:
        return {"value": value, "low": value - 0.06, "high": value + 0.06, "n": n, "unit": unit}

    counts = {
        "rows": 200,
        "wins": 91,
        "losses": 60,
        "ties": 45,
        "order_disagreements": 31,
        "unscored": 4,
        "without_profile": 0,
        "failures": {"timeout": 3, "unparsable": 2},
        "requests": 398,
        "cached_verdicts": 2,
    }
    written = {"rows": 200, "answers": 200, "mean_tokens": 212.4, "cut_off": 7, "empty": 0}
    no_effect = {"value": None, "low": None, "high": None, "n": 0, "unit": "prompt", "note": "no profile is told"}
    return {
        "rows": 200,
        "choices": 1050,
        "too_long": 3,
        "settings": {"temperature": 0.7, "max_new_tokens": 512, "profiles_per_prompt": 4, "seed": 0},
        "model": {
            "name": "models/tiny-base",
            "adapter": "runs/cuma",
            "answers": written,
            "spread_answers": written | {"answers": 800},
            "diversity": rate(1.082, 50, "prompt"),
        },
        "other": {
            "name": "models/tiny-base",
            "adapter": None,
            "answers": written | {"mean_tokens": 190.0},
            "spread_answers": None,
            "diversity": no_effect,
        },
        "judge": ATTACK,
        "win_rate": {
            "counts": counts,
            "win_rate": rate(0.579, 196),
            "win_rate_decided": rate(0.603, 151),
            "win_rate_resampled": rate(0.579, 141, "prompt × profile"),
            "length_controlled": rate(0.552, 141, "prompt × profile") | {"length_effect": 0.41},
            "length": {"mean": 1042.3, "mean_other": 921.0, "longer": 0.61},
        },
        "agreement": {
            "counts": counts | {"wins": 101, "losses": 52, "ties": 47, "unscored": 0, "failures": {}},
            "agreement": rate(0.622, 141, "person × prompt"),
            "agreement_decided": rate(0.66, 139, "person × prompt"),
            "chance": 0.5,
            "longer": rate(0.588, 141, "person × prompt"),
            "people": {"value": None, "low": None, "high": None, "n": 0, "unit": "person × prompt", "note": "no rows"},
            "agreement_shared": {"value": None, "low": None, "high": None, "n": 0, "unit": "", "note": "no rows"},
        },
    }


def _split(rng: np.random.Generator, num_panels: int) -> dict[str, Any]:
    panels = []
    for number, group in enumerate(GROUPS):
        for question, options in zip(QUESTIONS, (4, 10), strict=True):
            place = np.linspace(-1, 1, options)
            shares = [np.exp(-((place - c) ** 2) / w) for c, w in ((number / 3 - 0.8, 0.3), (number / 4 - 0.7, 0.5))]
            truth, predicted, marginal = (each / each.sum() for each in (*shares, np.exp(-(place**2))))
            panels.append(
                {
                    "question": question,
                    "group": group,
                    "options": [f"option {place + 1}" for place in range(options)],
                    "truth": truth.tolist(),
                    "predicted": predicted.tolist(),
                    "marginal": marginal.tolist(),
                }
            )
    true = rng.beta(4, 3, 1500) * 1.6
    predicted = np.arange(0.05, 1, 0.1)
    return {
        "counts": {
            "rows": 9000,
            "cells": 1500,
            "answers": 8990,
            "people": 812,
            "profiles": 640,
            "questions": 96,
            "bad_rows": {"no option is the answer": 7, "no question": 3},
        },
        "metrics": _metrics(0.0),
        "groups": {
            "country": [
                {
                    "group": group,
                    "n": 900 + 10 * number,
                    "people": 90 + number,
                    "accuracy": {"value": 0.5 + number / 100, "low": 0.47, "high": 0.58},
                    "emd": {"value": 0.1 + number / 100, "low": 0.08, "high": 0.19},
                }
                for number, group in enumerate(GROUPS)
            ]
        },
        "inequity": {
            "country": {
                "sigma": 0.021,
                "sigma_raw": 0.034,
                "low": 0.0,
                "high": 0.041,
                "worst": "Arvenia",
                "worst_value": 0.51,
                "groups": 6,
            },
            "country × religion": {"sigma": None, "sigma_raw": 0.11, "groups": 1, "note": "fewer than two groups"},
        },
        "stereotyping": {
            "all": {
                "spread_ratio": {"value": 0.81, "low": 0.74, "high": 0.88},
                "entropy_ratio": {"value": 1.07, "low": 1.02, "high": 1.12},
                "between": {"value": 0.213, "low": 0.2, "high": 0.226},
                "true_between": {"value": 0.263, "low": 0.25, "high": 0.276},
                "cells": 1500,
                "questions": 96,
            },
            "consensus": None,
            "groups": {},
        },
        "distributions": panels[:num_panels],
        "collapse": {
            "true_entropy": true.tolist(),
            "predicted_entropy": (0.7 * true + 0.4 + rng.normal(0, 0.1, 1500)).clip(0).tolist(),
            "marginal_entropy": rng.choice([1.1, 1.35, 1.5, 2.1], 1500).tolist(),
        },
        "calibration": {
            "bins": [
                {"mean_predicted": p, "observed": p**1.2, "n": int(3000 * (1 - p) ** 3) + 4}
                for p in predicted.tolist()
            ],
            "ece": 0.0312,
        },
    }


def _topology(rng: np.random.Generator, num_groups: int, num_routers: int) -> dict[str, Any]:
    names = (GROUPS + [f"Land {number}" for number in range(num_groups)])[:num_groups]
    points = rng.normal(size=(num_groups, 2))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    load = rng.dirichlet(np.full(4, 0.8), (num_groups, num_routers))
    routers = [f"{number // 2}.{'q_proj' if number % 2 else 'v_proj'}" for number in range(num_routers)]
    fields = {"country": 0.2, "religion": 0.1, "age": 0.002}
    no_information = {"value": None, "expected_under_null": None, "p": None, "note": "all are in one group"}
    return {
        "fields": ["country"],
        "measure": "load",
        "groups": [
            {"group": name, "people": int(people), "told_apart": 1.0}
            for name, people in zip(names, rng.integers(30, 900, num_groups), strict=True)
        ],
        "routers": routers,
        "load": load.tolist(),
        "gate": load.tolist(),
        "similarity": (1 - distance / distance.max() * 0.6).tolist(),
        "order": np.argsort(points[:, 0]).tolist(),
        "map": points.tolist(),
        "map_share": 0.83,
        "mutual_information": {
            field: [
                {"router": router, "value": size * rng.random(), "expected_under_null": 0.004, "p": 0.001}
                for router in routers
            ]
            for field, size in fields.items()
        }
        | {"planet": []},
        "mutual_information_mean": {
            field: {"value": size / 2, "expected_under_null": 0.004, "p": 0.001} for field, size in fields.items()
        }
        | {"planet": no_information},
        "dead_experts": {router: [2] if number == 3 else [] for number, router in enumerate(routers)},
        "reference": {
            "matched": names,
            "unmatched_groups": 1,
            "unmatched_reference": ["Elsewhere"],
            "disparity": 0.31,
            "disparity_p": 0.002,
            "mantel_r": 0.64,
            "mantel_p": 0.004,
            "model_map": (points / 5).tolist(),
            "reference_map": (points / 5 + rng.normal(0, 0.05, points.shape)).tolist(),
            "note": None,
        },
    }
