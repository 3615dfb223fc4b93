"""What the shape of a report is built from: closed objects, groups in which nothing is empty without a reason."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def meaning(text: str, default: Any = ...) -> Any:
    return Field(default, description=text)


class Closed(BaseModel):
    """An object that has these keys and no others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Group(Closed):
    """A closed object in which a value that is null or empty has a reason: FIELD_reason, else `reason`."""

    reason: str | None = meaning(
        "why the fields that are null have no value, where they have no reason of their own", None
    )

    @model_validator(mode="after")
    def _reasons(self) -> "Group":
        for name, value in self:
            if name == "reason" or name.endswith("_reason") or value not in (None, "", [], {}):
                continue
            if not (getattr(self, f"{name}_reason", None) or self.reason):
                raise ValueError(f"{name} is empty and neither {name}_reason nor reason says why")
        return self


class Spread(Closed):
    least: float
    median: float
    most: float


class Histogram(Closed):
    edges: list[float] = meaning("one more than there are bins, rising", ...)
    counts: list[Count] = meaning("clients in each bin, at most 40")

    @model_validator(mode="after")
    def _fits(self) -> "Histogram":
        if len(self.edges) != len(self.counts) + 1 or not 1 <= len(self.counts) <= 40:
            raise ValueError("a histogram has 1 to 40 bins and one edge more")
        return self


class Head(Closed):
    sequence: Count = meaning("its number of records")
    hash: Sha256 = meaning("the digest of the last")
