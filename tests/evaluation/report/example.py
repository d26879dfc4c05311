# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A made-up evaluation with everything that a document can hold, and names that are hard to show."""

from __future__ import annotations

from typing import Any

import numpy as np

GROUPS = ["Arvenia", "Bosk & Törv", "<b>Cintra</b>", "$Delmar$", "The United Republic of Eastern Fenwick", "Other"]
QUESTIONS = ["How important is family in your life?", "Is it justifiable to avoid a fare on public transport?"]
ATTACK = '"><script>document.title="attacked"</script>'


def evaluation(num_groups: int = 6, num_routers: int = 8) -> dict[str, Any]:
    """An evaluation of two splits, with topology and training."""
    rng = np.random.default_rng(0)
    return {
        "version": 1,
        "model": {
            "name": "models/tiny-base",
            "adapter": "runs/cuma",
            "parameters_trained": 1_234_567,
            "prompt_profile": False,
        },
        "splits": {"test": _split(rng), "held-out countries": {"counts": {"rows": 12}, "metrics": _metrics(0.02)}},
        "generation": {"win_rate": {"value": 0.61, "low": 0.55, "high": 0.67}, "ties": 12, "judge": ATTACK},
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


def _split(rng: np.random.Generator) -> dict[str, Any]:
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
        "distributions": panels,
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
        },
        "mutual_information_mean": {
            field: {"value": size / 2, "expected_under_null": 0.004, "p": 0.001} for field, size in fields.items()
        },
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
