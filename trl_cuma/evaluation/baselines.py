# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
What a survey's answers can be predicted from without a language model.

The oracle is the cells' truth itself; the training marginal is `survey.training_marginal[cells.question]`. The models
here learn from the answers that the adapters learn from: `AdditiveModel` per question, `FactorModel` across questions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..data.survey import Answers, Survey


class _ProfileModel:
    """
    `p(k | q, d) = softmax_k(log marginal[q, k] + effect(d)[q, k])`, fitted by penalised maximum likelihood.

    The effect depends on the one-hot values of a profile's fields. A missing field, and a value that no training
    person has, add nothing. All parameters are penalised by `penalty * sum(parameter^2)` on top of the mean log-loss
    of the training answers; the penalty with the least log-loss on the validation answers is kept as `self.penalty`.

    Work and memory grow with profiles × questions × options: everything is one dense product.
    """

    def __init__(self, survey: Survey, penalties: Sequence[float]) -> None:
        self._survey = survey
        trained = np.unique(survey.answers["train"].profile)
        values = sorted({item for index in trained for item in survey.profiles[index].items()})
        self._columns = {value: column for column, value in enumerate(values, start=1)}
        self._mask = torch.from_numpy(survey.option_mask)
        marginal = torch.from_numpy(survey.training_marginal)
        self._marginal_logits = marginal.log().masked_fill(~self._mask, float("-inf"))

        train, validation = (self._observations(survey.answers[split]) for split in ("train", "validation"))
        start = self._start(len(values) + 1)
        # Each fit starts anew: near zero, where a strong penalty ends, the factor model's gradient vanishes.
        fits = {penalty: self._fit(*train, start, penalty) for penalty in penalties}
        losses = {penalty: float(self._log_loss(*validation, weights)) for penalty, weights in fits.items()}
        self.penalty = min(losses, key=losses.__getitem__)
        self._weights = fits[self.penalty]

    def predict(self, question: np.ndarray, profile: np.ndarray) -> np.ndarray:
        """
        Option distributions of cells.

        Args:
            question (`np.ndarray` of shape `(cells,)`): Index into the survey's `questions`.
            profile (`np.ndarray` of shape `(cells,)`): Index into the survey's `profiles`.

        Returns:
            `np.ndarray` of shape `(cells, max_options)`: Zero beyond a question's own options.
        """
        unique, inverse = np.unique(profile, return_inverse=True)
        return self._log_probs(self._design(unique), self._weights).exp().numpy()[inverse, question]

    def _start(self, num_columns: int) -> list[torch.Tensor]:
        """Parameters to start from; the design matrix has `num_columns` columns."""
        raise NotImplementedError

    def _effect(self, design: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        """Logits to add to the marginal's, `(profiles, questions, max_options)`."""
        raise NotImplementedError

    def _design(self, profiles: np.ndarray) -> torch.Tensor:
        """One-hot values of profiles, `(profiles, columns)`; the first column is 1 for every profile."""
        design = torch.zeros(len(profiles), len(self._columns) + 1, dtype=torch.float64)
        design[:, 0] = 1.0
        for row, index in enumerate(profiles):
            known = [self._columns[item] for item in self._survey.profiles[index].items() if item in self._columns]
            design[row, known] = 1.0
        return design

    def _observations(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        """Design matrix `(profiles, columns)` and answer counts `(profiles, questions, max_options)`."""
        unique, inverse = np.unique(answers.profile, return_inverse=True)
        counts = np.zeros((len(unique), *self._mask.shape))
        np.add.at(counts, (inverse, answers.question, answers.choice), 1.0)
        return self._design(unique), torch.from_numpy(counts)

    def _log_probs(self, design: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        return (self._marginal_logits + self._effect(design, weights)).log_softmax(-1)

    def _log_loss(self, design: torch.Tensor, counts: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        # The log-probability of an option that a question lacks is -inf, and 0 * -inf is not a number.
        log_probs = self._log_probs(design, weights).masked_fill(~self._mask, 0.0)
        return -(counts * log_probs).sum() / counts.sum()

    def _fit(
        self, design: torch.Tensor, counts: torch.Tensor, start: list[torch.Tensor], penalty: float
    ) -> list[torch.Tensor]:
        weights = [weight.clone().requires_grad_() for weight in start]
        optimizer = torch.optim.LBFGS(
            weights, max_iter=200, tolerance_grad=1e-6, tolerance_change=1e-7, line_search_fn="strong_wolfe"
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            penalties = torch.stack([weight.square().sum() for weight in weights])
            loss = self._log_loss(design, counts, weights) + penalty * penalties.sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return [weight.detach() for weight in weights]


class AdditiveModel(_ProfileModel):
    """
    Multinomial logistic regression per question on the one-hot values of every field:

        p(k | q, d) = softmax_k(log marginal[q, k] + b[q, k] + sum_f w[q, k, d_f])

    It sees no interaction between fields and shares nothing between questions: what an adapter has to beat on
    combinations of fields never seen together. With a single field it has nothing to say about a value whose answers
    to the question were never seen, and stays near the question's own mean there.

    Args:
        survey (`Survey`): Fitted on its training answers; the L2 penalty is chosen on its validation answers.
        penalties (`Sequence[float]`, *optional*): L2 penalties to choose from.
    """

    def __init__(self, survey: Survey, penalties: Sequence[float] = (1e-5, 3e-5, 1e-4, 3e-4)) -> None:
        super().__init__(survey, penalties)

    def _start(self, num_columns: int) -> list[torch.Tensor]:
        return [torch.zeros(num_columns, *self._mask.shape, dtype=torch.float64)]

    def _effect(self, design: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        return (design @ weights[0].flatten(1)).unflatten(1, self._mask.shape)


class FactorModel(_ProfileModel):
    """
    A low-rank model that shares between questions what it learns about a profile:

        p(k | q, d) = softmax_k(log marginal[q, k] + x_k u(d)·v_q + (x_k^2 - 1/3) u(d)·w_q),    u(d) = b + sum_f u_f

    `x_k` is the option's place on the scale, -1 to 1; `u`, `v` and `w` are vectors of length `rank`. Where no answer
    of a profile to *this* question was seen (a held-out question-country cell), `AdditiveModel` gives little but the
    question's mean; this one predicts from the profile's answers to other questions.

    Args:
        survey (`Survey`): Fitted on its training answers; the L2 penalty is chosen on its validation answers.
        rank (`int`, *optional*, defaults to 4): Length of the vectors.
        penalties (`Sequence[float]`, *optional*): L2 penalties to choose from.
        seed (`int`, *optional*, defaults to 0): Seed of the vectors to start from.
    """

    def __init__(
        self, survey: Survey, rank: int = 4, penalties: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3), seed: int = 0
    ) -> None:
        self._rank, self._seed = rank, seed
        steps = torch.from_numpy(survey.num_options - 1.0)[:, None]
        self._place = 2 * torch.arange(survey.max_options, dtype=torch.float64) / steps - 1  # (questions, options)
        super().__init__(survey, penalties)

    def _start(self, num_columns: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self._seed)
        rows = (num_columns, len(self._place), len(self._place))
        return [0.1 * torch.randn(n, self._rank, generator=generator, dtype=torch.float64) for n in rows]

    def _effect(self, design: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        values, tilt, spread = weights
        vectors = design @ values  # (profiles, rank)
        tilts, spreads = (vectors @ tilt.T)[..., None], (vectors @ spread.T)[..., None]  # (profiles, questions, 1)
        return tilts * self._place + spreads * (self._place.square() - 1 / 3)
