# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The topology of a CuMA adapter: which experts serve whom."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..adapter.routing import reportable_groups
from ..data.people import MIN_COUNT, OTHER, known_text
from ..demographics import DemographicTable
from ..demographics.profile import is_vector, read_profiles
from ..extras import needs_extra
from ..generation.vectors import demographic_table
from .expert_information import ExpertInformation, count_people, expert_information, group_means
from .profile_routing import ProfileRouting, Prompt, route_profiles, routing_config
from .reference_map import ReferenceComparison, classical_map, compare_with_reference, read_reference_map

with needs_extra("evaluation", "The topology"):
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform
    from scipy.special import rel_entr

DEAD = 0.01
"""An expert with less than this part of an even load is dead, as in the trainers' logs."""

ONE_GROUP = "all are in one group"
OWN_GROUPS = "each profile is a group of its own: a random assignment gives as much by construction"


@dataclass(frozen=True, eq=False)
class Topology:
    """
    Attributes:
        fields (`list[str]`): what makes the groups.
        measure (`str`): `"load"` or `"gate"`: what the statistics below are of.
        groups (`list[str]`): names; those of several fields joined by " × ". `"Other"` are the people of all groups
            that are not shown and of those of whom a field is unknown.
        people (`np.ndarray` of shape `(groups,)`): their numbers.
        told_apart (`np.ndarray` of shape `(groups,)`): share of a group's people whose vector nobody in another group
            has: at 0 the routers can't know the group (a field encoder leaves rare and unseen values out).
        routers (`list[str]`): names.
        load, gate (`np.ndarray` of shape `(groups, routers, experts)`): means over people, see [`ProfileRouting`].
        similarity (`np.ndarray` of shape `(groups, groups)`): 1 - the Jensen-Shannon distance, 1 alike, 0 no expert in
            common.
        order (`np.ndarray` of shape `(groups,)`): of the groups, for a heat map: the hierarchical clustering's leaves.
        map (`np.ndarray` of shape `(groups, 2)`): the groups in the plane.
        map_share (`float`): the share of the squared distances that the plane shows.
        mutual_information (`dict`): field → [`ExpertInformation`], or a text that says why there is none: all people
            are in one group, or each is in one of their own, as the countries of published cells are.
        dead_experts (`dict`): router → experts with less than 1 % of an even load in every group.
        reference ([`ReferenceComparison`], *optional*): against the reference map.
    """

    fields: list[str]
    measure: str
    groups: list[str]
    people: np.ndarray
    told_apart: np.ndarray
    routers: list[str]
    load: np.ndarray
    gate: np.ndarray
    similarity: np.ndarray
    order: np.ndarray
    map: np.ndarray
    map_share: float
    mutual_information: dict[str, ExpertInformation | str]
    dead_experts: dict[str, list[int]]
    reference: ReferenceComparison | None

    def to_dict(self) -> dict[str, Any]:
        """`evaluation.json`'s "topology". Of the people it tells the names of groups of `min_group_size` or more."""
        return {
            "fields": self.fields,
            "measure": self.measure,
            "groups": [
                {"group": group, "people": int(people), "told_apart": round(float(told_apart), 6)}
                for group, people, told_apart in zip(self.groups, self.people, self.told_apart, strict=True)
            ],
            "routers": self.routers,
            "load": np.round(self.load, 6).tolist(),
            "gate": np.round(self.gate, 6).tolist(),
            "similarity": np.round(self.similarity, 6).tolist(),
            "order": self.order.tolist(),
            "map": np.round(self.map, 6).tolist(),
            "map_share": round(self.map_share, 6),
            "mutual_information": {
                field: []
                if isinstance(found, str)
                else [
                    {"router": router, "value": value, "expected_under_null": expected, "p": p}
                    for router, value, expected, p in zip(
                        self.routers, found.value.tolist(), found.expected.tolist(), found.p.tolist(), strict=True
                    )
                ]
                for field, found in self.mutual_information.items()
            },
            "mutual_information_mean": {
                field: {"value": None, "expected_under_null": None, "p": None, "note": found}
                if isinstance(found, str)
                else {"value": found.mean_value, "expected_under_null": found.mean_expected, "p": found.mean_p}
                for field, found in self.mutual_information.items()
            },
            "dead_experts": self.dead_experts,
            "reference": None if self.reference is None else self.reference.to_dict(),
        }


def evaluate_topology(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    profiles: Sequence[Any],
    fields: Sequence[str],
    *,
    person_ids: Sequence[Hashable] | None = None,
    labels: Mapping[str, Sequence[Any]] | None = None,
    table: DemographicTable | None = None,
    measure: Literal["load", "gate"] = "load",
    min_group_size: int = MIN_COUNT,
    reference: str | os.PathLike[str] | None = None,
    permutations: int = 999,
    seed: int = 0,
    batch_size: int = 32,
    show_progress: bool = False,
) -> Topology:
    """
    Map the people of an evaluation set by how a CuMA adapter routes them. All of them get the same prompts; each
    unique vector is computed once.

    Args:
        model (`PeftModel`): with a CuMA adapter.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`Sequence`): texts or conversations, that don't state a profile; see [`route_profiles`].
        profiles (`Sequence`): each row's profile: mapping, text, vector or `None`.
        fields (`Sequence[str]`): of the profiles or `labels`: what makes the groups, several of them combined.
        person_ids (`Sequence[Hashable]`, *optional*): who each row is about; each counts once. By default each row is
            a person.
        labels (`Mapping[str, Sequence]`, *optional*): further fields, which the model does not read (a region, say):
            name → each row's value.
        table (`DemographicTable`, *optional*): profile → vector. By default made from the adapter's encoder.
        measure, min_group_size, permutations, seed: see [`map_topology`].
        reference (`str` or `os.PathLike`, *optional*): a file with a map, see [`read_reference_map`].
        batch_size, show_progress: see [`route_profiles`].

    Raises:
        TypeError, ValueError: as [`route_profiles`], [`map_topology`] and [`read_reference_map`]; for rows that don't
            fit together, or two rows of a person that differ; a row of profiles that the encoder can't read.
    """
    routing_config(model)  # or it says why there is nothing to map
    places = None if reference is None else read_reference_map(reference)
    table = table or demographic_table(model)
    ids = table.lookup(profiles).numpy()
    texts = {field: [known_text(field, value) for value in column] for field, column in (labels or {}).items()}
    rows = _rows_of_people(ids, person_ids, texts)
    known = [profile.fields for profile in read_profiles(None if is_vector(each) else each for each in profiles)]
    values = {
        field: [known[row].get(field) for row in rows] for field in sorted({name for each in known for name in each})
    }
    values |= {field: [column[row] for row in rows] for field, column in texts.items()}
    unique, profile = np.unique(table.embeds[ids[rows]].numpy(), axis=0, return_inverse=True)
    routing = route_profiles(
        model, tokenizer, prompts, torch.from_numpy(unique), batch_size=batch_size, show_progress=show_progress
    )
    return map_topology(
        routing,
        profile.reshape(-1),
        values,
        fields,
        measure=measure,
        min_group_size=min_group_size,
        reference=places,
        permutations=permutations,
        seed=seed,
    )


def fields_with_groups(profiles: Sequence[Any], fields: Sequence[str], min_group_size: int) -> list[str]:
    """
    Those fields that [`evaluate_topology`] can group by: that make two groups or more.

    Args:
        profiles (`Sequence`): each person's: mapping, text, vector or `None`.
        fields (`Sequence[str]`): to choose from.
        min_group_size (`int`): people.
    """
    known = [profile.fields for profile in read_profiles(None if is_vector(each) else each for each in profiles)]
    columns = {field: [each.get(field) for each in known] for field in fields}
    return [field for field, column in columns.items() if len(_shown_groups(column, min_group_size)[0]) > 1]


def map_topology(
    routing: ProfileRouting,
    profile: np.ndarray,
    values: Mapping[str, Sequence[str | None]],
    fields: Sequence[str],
    *,
    measure: Literal["load", "gate"] = "load",
    min_group_size: int = MIN_COUNT,
    reference: Mapping[str, tuple[float, float]] | None = None,
    permutations: int = 999,
    seed: int = 0,
) -> Topology:
    """
    Aggregate routing to groups of people, and compare these.

    A group's routing is its people's mean. The distance of two groups is the Jensen-Shannon distance of their shares
    of the experts (base 2: 0 alike, 1 no expert in common), as root mean square over routers. It is a Euclidean
    distance in some space, which the clustering (average linkage, leaves ordered optimally) and the map (classical
    scaling) are of.

    A group of fewer than `min_group_size` people goes into "Other", with all people of whom a field is unknown and
    those whose value is "Other". Where that would be fewer people still, the smallest other group joins them, so that
    nobody can be had by subtraction. The mutual information is of such groups, too, for each of `values`.

    Args:
        routing (`ProfileRouting`): of unique profiles.
        profile (`np.ndarray` of shape `(people,)`): index into these.
        values (`Mapping`): field → each person's value, `None` where unknown.
        fields (`Sequence[str]`): what makes the groups.
        measure (`str`): statistics of the `"load"`, or of the `"gate"` (scaled to sum to 1 over experts).
        min_group_size (`int`): people. 1 for profiles that aren't people's, as those of whole countries.
        reference (`Mapping`, *optional*): group → two coordinates.
        permutations (`int`): of people, for the mutual information, and of groups, for the reference.
        seed (`int`): of these.

    Raises:
        ValueError: if a field has no values, fewer than two groups are large enough, an argument is out of range, or
            the measure is constant by construction.
    """
    if measure not in ("load", "gate"):
        raise ValueError(f"`measure` must be 'load' or 'gate', got {measure!r}.")
    for name, number in (("min_group_size", min_group_size), ("permutations", permutations)):
        if number < 1:
            raise ValueError(f"`{name}` must be 1 or more, got {number}.")
    unknown = sorted(set(fields) - {field for field, column in values.items() if any(v is not None for v in column)})
    if unknown or not fields or isinstance(fields, str):
        raise ValueError(
            f"`fields` must list some of the profiles' and labels' fields {sorted(values)}, got "
            f"{fields if isinstance(fields, str) else list(fields)}."
        )
    shares = routing.load if measure == "load" else routing.gate / routing.gate.sum(-1, keepdims=True)
    experts = shares.shape[-1]
    if measure == "load" and np.ptp(shares) < 1e-6 and np.ptp(routing.gate) > 1e-6:
        raise ValueError(
            f"Each token goes to all {experts} experts, so that the load is even whatever the routers do. Use "
            "`measure='gate'`."
        )
    combined = [
        None if None in each else " × ".join(each) for each in zip(*(values[field] for field in fields), strict=True)
    ]
    groups, codes = _shown_groups(combined, min_group_size)
    if len(groups) < 2:
        raise ValueError(
            f"`fields={list(fields)}` makes fewer than two groups of `min_group_size={min_group_size}` or more of the "
            f"{len(profile)} people. Use more people, coarser fields, or a smaller `min_group_size`."
        )
    counts = count_people(codes, profile, len(groups), len(shares))
    of_group = group_means(counts, shares)
    distance = _jensen_shannon(of_group)
    information: dict[str, ExpertInformation | str] = {}
    for field, column in values.items():
        names, of_person = _shown_groups(column, min_group_size)
        if len(names) == 1:
            information[field] = ONE_GROUP
        elif len(names) == len(profile):
            information[field] = OWN_GROUPS
        else:
            information[field] = expert_information(shares, profile, of_person, permutations, seed)
    dead = (of_group < DEAD / experts).all(0)
    named = [row for row, group in enumerate(groups) if group != OTHER]
    plane, plane_share = classical_map(distance)
    alone = (counts > 0).sum(0) == 1
    return Topology(
        fields=list(fields),
        measure=measure,
        groups=groups,
        people=counts.sum(1).astype(int),
        told_apart=counts.toarray()[:, alone].sum(1) / counts.sum(1),
        routers=list(routing.routers),
        load=group_means(counts, routing.load),
        gate=group_means(counts, routing.gate),
        similarity=1 - distance,
        order=leaves_list(linkage(squareform(distance), "average", optimal_ordering=True)),
        map=plane,
        map_share=plane_share,
        mutual_information=information,
        dead_experts={
            router: np.flatnonzero(mask).tolist() for router, mask in zip(routing.routers, dead, strict=True)
        },
        reference=None
        if reference is None
        else compare_with_reference(
            [groups[row] for row in named],
            distance[np.ix_(named, named)],
            reference,
            permutations=permutations,
            seed=seed,
        ),
    )


def _rows_of_people(
    ids: np.ndarray, person_ids: Sequence[Hashable] | None, labels: Mapping[str, Sequence[str | None]]
) -> list[int]:
    """Each person's first row."""
    columns = {f"labels[{field!r}]": column for field, column in labels.items()}
    if person_ids is not None:
        columns["person_ids"] = person_ids
    for name, column in columns.items():
        if len(column) != len(ids):
            raise ValueError(f"`{name}` has {len(column)} entries for {len(ids)} profiles. Pass one per row.")
    first: dict[Hashable, int] = {}
    for row, person in enumerate(range(len(ids)) if person_ids is None else person_ids):
        earlier = first.setdefault(person, row)
        if ids[row] != ids[earlier] or any(column[row] != column[earlier] for column in labels.values()):
            raise ValueError(
                f"Rows {earlier} and {row} are of one person and have different profiles or labels. A person has one "
                "profile: keep one, or give the rows ids of their own."
            )
    return list(first.values())


def _shown_groups(values: Sequence[str | None], min_size: int) -> tuple[list[str], np.ndarray]:
    """The groups' names, "Other" last where anybody is in it, and each person's group `(people,)`."""
    members: dict[str, set[Hashable]] = defaultdict(set)
    for person, value in enumerate(values):
        if value is not None and value != OTHER:
            members[value].add(person)
    names = reportable_groups(members, set(range(len(values))), min_size)
    index = {name: number for number, name in enumerate(names)}
    codes = np.array([index.get(value, len(names)) for value in values])
    return (names + [OTHER] if (codes == len(names)).any() else names), codes


def _jensen_shannon(shares: np.ndarray) -> np.ndarray:
    """Distances `(groups, groups)` of `(groups, routers, experts)`, see [`map_topology`]."""
    divergence = np.zeros((len(shares), len(shares)))
    for router in shares.transpose(1, 0, 2):  # one at a time: all pairs of all routers would be large
        left, right = router[:, None], router[None]
        middle = (left + right) / 2
        divergence += (rel_entr(left, middle) + rel_entr(right, middle)).sum(-1).clip(min=0)
    return np.sqrt(divergence / (2 * math.log(2) * shares.shape[1]))
