# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What the trainers log of the routers: over all rows, and by group at evaluation."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset

from ..adapter.routing import mutual_information, reportable_groups
from ..demographics import DemographicTable
from ..demographics.profile import is_vector, read_profiles


def load_metrics(load: torch.Tensor, entropy: torch.Tensor) -> dict[str, float]:
    """
    Args:
        load (`torch.Tensor`): `(routers, experts)`: the share of the tokens that each expert gets; sums to 1.
        entropy (`torch.Tensor`): `()` mean entropy of the routers' probabilities, nats.

    Returns:
        `utilization`: exp of the load's entropy over the number of experts, mean over routers, 1 is even; `entropy`;
        `dead_experts`: experts, over all routers, with less than 1 % of an even load.
    """
    experts = load.shape[-1]
    return {
        "utilization": (torch.special.entr(load).sum(-1).exp().mean() / experts).item(),
        "entropy": entropy.item(),
        "dead_experts": (load < 0.01 / experts).sum().item(),
    }


class GroupRouting:
    """
    The routing statistics of one evaluation, by the groups that some fields of the profile make.

    A group with fewer than `min_size` people is not reported, and can't be had by subtraction either: where the
    unreported people of a field would be fewer than that, its smallest other group goes unreported with them. A person
    is told apart by `person_column` where the data set has it, else each row counts as one. Profiles with the same
    vector in different groups (a field encoder leaves rare values out) belong to none of them: the router cannot tell
    them apart.

    Args:
        dataset (`Dataset`): the evaluation set, as the user passed it.
        table (`DemographicTable`): profile → vector.
        column, person_column (`str`): the columns with the profile and, perhaps, the person.
        fields (`Sequence[str]`): fields of the profile.
        min_size (`int`): people.
        rows_per_example (`int`): rows that a forward has of each.

    Raises:
        TypeError: if the data set is a stream, which would have to be read twice.
        ValueError: if the column holds no mappings, or a field that no row has is named.
    """

    def __init__(
        self,
        dataset: Dataset,
        table: DemographicTable,
        column: str,
        person_column: str,
        fields: Sequence[str],
        min_size: int,
        *,
        rows_per_example: int = 1,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(
                "`cuma_group_by` reads the evaluation set's profiles before it is evaluated, which a streaming one "
                "does not allow. Pass a `Dataset`, or leave `cuma_group_by` out."
            )
        values = dataset[column]
        profiles = read_profiles(None if is_vector(value) else value for value in values)
        known = {name for profile in profiles for name in profile.fields}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(
                f"`cuma_group_by` names {unknown}, but the profiles in the {column!r} column have the fields "
                f"{sorted(known)}. Name some of these; text and vectors have none."
            )
        people = dataset[person_column] if person_column in dataset.column_names else range(len(profiles))
        members: dict[str, dict[str, set[Any]]] = {field: defaultdict(set) for field in fields}
        for profile, person in zip(profiles, people, strict=True):
            for field in fields:
                if field in profile.fields:
                    members[field][profile.fields[field]].add(person)
        everybody = set(people)
        self.names = [
            (field, value) for field in fields for value in reportable_groups(members[field], everybody, min_size)
        ]
        self._min_rows = min_size * rows_per_example
        index = {name: number for number, name in enumerate(self.names)}
        self._fields = list(fields)
        self._vectors = table.embeds[table.lookup(values)]
        # (rows, fields): the group's number, -1 for none
        self._groups = [[index.get((f, p.fields.get(f)), -1) for f in fields] for p in profiles]
        self._keys: dict[torch.dtype, dict[bytes, list[int]]] = {}
        self._sums: torch.Tensor | None = None

    def _groups_of(self, embeds: torch.Tensor) -> torch.Tensor:
        """`(rows, fields)`: each vector's groups. DeepSpeed casts the batch, so the same cast is looked up."""
        keys = self._keys.get(embeds.dtype)
        if keys is None:
            keys = self._keys[embeds.dtype] = {}
            for vector, groups in zip(_bytes_of(self._vectors.to(embeds.dtype)), self._groups, strict=True):
                seen = keys.setdefault(vector, groups)
                if seen != groups:
                    keys[vector] = [one if one == other else -1 for one, other in zip(seen, groups, strict=True)]
        nobody = [-1] * len(self._fields)
        groups = [keys.get(vector, nobody) for vector in _bytes_of(embeds)]
        return torch.tensor(groups, dtype=torch.long).view(-1, len(self._fields))  # also of no rows

    def add(self, embeds: torch.Tensor, load: torch.Tensor, entropy: torch.Tensor) -> None:
        """
        Take in one forward.

        Args:
            embeds (`torch.Tensor`): `(rows, dim)`.
            load (`torch.Tensor`): `(rows, routers, experts)`.
            entropy (`torch.Tensor`): `(rows, routers)`.
        """
        rows = torch.cat([load.flatten(1), entropy.mean(1, keepdim=True), torch.ones_like(entropy[:, :1])], 1)
        rows = rows.cpu().double()
        if self._sums is None:  # the last one is everybody's
            self._sums = rows.new_zeros(len(self.names) + 1, rows.shape[1])
            self._shape = load.shape[1:]
        self._sums[-1] += rows.sum(0)
        for column in self._groups_of(embeds).unbind(1):
            self._sums.index_add_(0, column[column >= 0], rows[column >= 0])

    def metrics(self, prefix: str, accelerator: Accelerator) -> dict[str, float]:
        """
        The statistics over all processes, under names such as `eval_router/country=JP/utilization`; with
        `eval_router/country/mutual_information`, between expert and group (nats, mean over routers): 0 where all
        groups are routed alike.
        """
        if self._sums is None:
            return {}
        sums = self._sums
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
        counts = sums[:, -1]
        means = sums / counts.clamp(min=1).unsqueeze(1)
        loads, entropies = means[:, :-2].unflatten(1, self._shape), means[:, -2]
        prefix = f"{prefix}_router"
        found = {f"{prefix}/{name}": value for name, value in load_metrics(loads[-1], entropies[-1]).items()}
        for number, (field, value) in enumerate(self.names):
            if counts[number] >= self._min_rows:
                metrics = load_metrics(loads[number], entropies[number])
                found |= {f"{prefix}/{field}={value}/{name}": metric for name, metric in metrics.items()}
        for field in self._fields:
            of_field = [n for n, (name, _) in enumerate(self.names) if name == field and counts[n] >= self._min_rows]
            if len(of_field) > 1:
                information = mutual_information(loads[of_field], counts[of_field]).mean().item()
                found[f"{prefix}/{field}/mutual_information"] = information
        return found


def _bytes_of(vectors: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in vectors.detach().float().cpu().numpy()]
