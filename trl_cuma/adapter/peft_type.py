# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The one extension of PEFT's closed enum `PeftType`.

PEFT has no plugin hook: `register_peft_method` insists that the method's name is a member of `PeftType`, and an enum
that has members cannot be subclassed. So one member is added, once, here; everything else uses public functions.
"""

from peft import PeftType


def add_peft_type(name: str) -> PeftType:
    """Return `PeftType[name]`, adding the member if it is missing.

    The member is a real one: `PeftType("CUMA")`, pickling, deep copies and JSON all work.

    Args:
        name (`str`): the member's name and value, in capitals.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    # What an enum's members have, and no stub knows.
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


CUMA = add_peft_type("CUMA")
