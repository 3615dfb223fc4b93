"""Clients as data: names that are computed from an index, and mappings by name that compute their values."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class Names(Sequence[str]):
    """Names in ascending order; each knows its place."""

    def place(self, name: str) -> int:
        """The index of `name`. Raises KeyError for one that is not here."""
        raise NotImplementedError

    def __contains__(self, name: object) -> bool:
        try:
            return self.place(name) >= 0  # type: ignore[arg-type]
        except KeyError:
            return False


class Numbered(Names):
    """client-000, client-001, ...: a million of them take no memory."""

    def __init__(self, number: int, digits: int = 0) -> None:
        """digits: of each number, zeros in front; as many as the last one needs where that is more."""
        self.number, self.digits = number, max(digits, len(str(number - 1)))
        self._form = f"client-%0{self.digits}d"

    def place(self, name: str) -> int:
        if isinstance(name, str) and (figures := name[7:]).isdecimal():
            at = int(figures)
            if at < self.number and name == self._form % at:
                return at
        raise KeyError(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Numbered) and (self.number, self.digits) == (other.number, other.digits)

    def __hash__(self) -> int:
        return hash((self.number, self.digits))

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[str]:
        return (self._form % at for at in range(self.number))

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[str]: ...
    def __getitem__(self, at: int | slice) -> str | Sequence[str]:
        chosen = range(self.number)[at]  # negative ones, and IndexError
        if isinstance(chosen, int):
            return self._form % chosen
        return [self._form % one for one in chosen]


class Listed(Names):
    """Names as they came."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(sorted(names))
        self._places = {name: at for at, name in enumerate(self._names)}

    def place(self, name: str) -> int:
        return self._places[name]

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Listed) and self._names == other._names)

    def __hash__(self) -> int:
        return hash(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[str]: ...
    def __getitem__(self, at: int | slice) -> str | Sequence[str]:
        return self._names[at]


class ByName(Mapping[str, T]):
    """One value for each of `names`, computed from the name's index when it is asked for."""

    def __init__(self, names: Names, value: Callable[[int], T]) -> None:
        self.names, self._value = names, value

    def value(self, at: int) -> T:
        """Of the client at this index."""
        return self._value(at)

    def __getitem__(self, name: str) -> T:
        return self.value(self.names.place(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names


def named(clients: Iterable[str]) -> Names:
    """The names of `clients`, a mapping by name or the names themselves, in ascending order."""
    if isinstance(clients, ByName):
        return clients.names
    return clients if isinstance(clients, Names) else Listed(clients)
