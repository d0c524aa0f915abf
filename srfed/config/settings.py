"""What a setting is: type, range, default, meaning, and what it decides, said at one place."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Decides = Literal["run", "scores", "nothing"]


class Section(BaseModel):
    """A group of settings: immutable, no unknown keys, no conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def setting(
    default: Any = ..., *, description: str, decides: Decides = "run", **constraints: Any
) -> Any:
    """One setting, as pydantic's ``Field``.

    Args:
        default: its value where nobody says one.
        description: its meaning, for ``--help``.
        decides: "run" where another value makes other weights, "scores" where it makes other
            scores of the same weights, "nothing" where it says how or where long work is done, or
            how it looks. A resumed run may change the last kind only.
        constraints: what pydantic's ``Field`` takes: ge, le, pattern, default_factory.
    """
    if "default_factory" not in constraints:
        constraints["default"] = default
    return Field(description=description, json_schema_extra={"decides": decides}, **constraints)


def decides(model: type[BaseModel], name: str) -> Decides:
    """What a setting of this section decides."""
    extra = model.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return extra["decides"]  # type: ignore[return-value]
