"""Input checks shared by the operators and the model: each error names the argument, what came and what was expected.

Values of tensors (`values`) are looked at on a CPU only, where that costs no wait; shapes, dtypes and numbers anywhere.
"""

from __future__ import annotations

import functools
import math
import numbers
import reprlib
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

T = TypeVar("T")
SMALLEST_LEVEL, LARGEST_LEVEL = 1e-18, 1e18  # of noise: float32 holds their squares
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MOST_REMEMBERED = 4096
CPU = torch.device("cpu")


# Tensors


def tensor(name: str, value: object) -> None:
    """TypeError unless value is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one")


def floating(**tensors: Tensor) -> None:
    """Each is a dense bfloat16, float16, float32 or float64 tensor, and all lie on one device.

    Of a GPU's tensors the operator itself refuses those that are not dense (registration.define): under
    torch.set_default_device each look at an attribute takes microseconds.

    In all checks a message is made only where it is needed: a size in one would become a constant of torch.compile's
    graph.
    """
    first_name, first = "", None
    for name, given in tensors.items():
        if not isinstance(given, Tensor):
            tensor(name, given)
        dtype, device = given.dtype, given.device
        if dtype not in FLOATS:
            raise TypeError(f"{name}: expected bfloat16, float16, float32 or float64, got {_name(dtype)}")
        if first is None:
            first_name, first = name, device
        elif device != first:
            raise ValueError(f"{name}: expected a tensor on {first} like {first_name}, got one on {device}")
    if device == CPU:  # the name of a device's type costs 2 µs
        for name, given in tensors.items():
            tensor(name, given)


def same_dtype(**dtypes: torch.dtype) -> None:
    """All dtypes are the first one."""
    given = list(dtypes.items())
    for name, dtype in given[1:]:
        if dtype != given[0][1]:
            raise TypeError(f"{name}: expected {_name(given[0][1])} like {given[0][0]}, got {_name(dtype)}")


def shape(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """`tensor` has the expected shape; a string stands for a size that is free, by its name.

    >>> shape("scale", torch.zeros(2, 3), ["B", 3])
    """
    sizes = tensor.shape
    if len(sizes) == len(expected):
        for size, wanted in zip(sizes, expected, strict=True):
            if not isinstance(wanted, str) and size != wanted:
                break
        else:
            return
    raise ValueError(f"{name}: expected shape [{', '.join(map(str, expected))}], got {list(sizes)}")


def concrete(tensor: Tensor) -> bool:
    """Whether the values can be looked at: of a plain dense CPU tensor, outside torch.compile, export, functorch's
    transforms, dispatch modes (tracing, fake tensors) and the capture of a CUDA graph.
    """
    return (
        tensor.is_cpu
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided  # others are refused by the operator
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and torch._C._len_torch_dispatch_stack() == 0
        and not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def values(name: str, tensor: Tensor, holds: Callable[[Tensor], Tensor], expected: str) -> None:
    """ValueError unless holds(tensor) is true everywhere; looked at where it is `concrete`, elsewhere taken for right.

    expected: what the values should be, in words.
    """
    if tensor.is_cpu and not is_dynamo_compiling() and concrete(tensor):
        with torch.no_grad():
            right = holds(tensor)
            if not right.all():
                wrong = tensor[~right].flatten()[:4].tolist()
                raise ValueError(f"{name}: expected {expected}, got {', '.join(f'{v:g}' for v in wrong)}")


def nonempty(name: str, tensor: Tensor, first: int = 1) -> None:
    """Every size of `tensor` from dimension `first` on is at least 1; those before, the batch, may be 0."""
    if 0 in tensor.shape[first:]:
        which = "every size" if first == 0 else "every size but the batch's"
        raise ValueError(f"{name}: expected {which} to be at least 1, got shape {list(tensor.shape)}")


def positive(tensor: Tensor) -> Tensor:
    """Where a tensor is finite and above 0, for `values`."""
    return (tensor > 0) & (tensor < math.inf)


def noise_level(tensor: Tensor) -> Tensor:
    """Where a tensor holds noise levels whose squares float32 holds, for `values`."""
    wide = tensor.double()  # float16 would round the bounds to 0 and infinity
    return (wide >= SMALLEST_LEVEL) & (wide <= LARGEST_LEVEL)


def returned(name: str, value: object, like: Tensor) -> Tensor:
    """value, which the function called `name` gave back: a floating-point tensor of the shape and device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected it to return a torch.Tensor, got {type(value).__name__}")
    if value.shape != like.shape:
        raise ValueError(f"{name}: expected it to return shape {list(like.shape)}, got {list(value.shape)}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected it to return a floating-point tensor, got {_name(value.dtype)}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected it to return a tensor on {like.device}, got one on {value.device}")
    return value


# Numbers and words


def integer(name: str, value: object, minimum: int = 1, maximum: int | None = None) -> int:
    """value as an int (NumPy's integers are taken, True and 7.0 are not), at least minimum and at most maximum."""
    if type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name}: expected an integer of at least {minimum}, got {shown(value)}")
        value = int(value)
    if value < minimum:
        raise ValueError(f"{name}: expected an integer of at least {minimum}, got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name}: expected an integer of at most {maximum:,}, got {shown(value)}")
    return value


def number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    infinite: bool = False,
) -> float:
    """value as a float (NumPy's numbers are taken, True, text and tensors are not) inside the bounds; never NaN.

    infinite: whether infinity is a value inside the bounds.
    """
    if type(value) is float:
        if above < value < below and at_least <= value <= at_most:  # most calls
            return value
    else:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: expected {_bounds(above, at_least, at_most, below)}, got {shown(value)}")
        try:
            value = float(value)
        except OverflowError:  # an integer beyond the largest float
            value = math.copysign(math.inf, value)
    finite = -math.inf < value < math.inf or (infinite and value == value)
    inside = value > above or above == -math.inf
    if not (finite and inside and at_least <= value <= at_most and (value < below or below == math.inf)):
        raise ValueError(f"{name}: expected {_bounds(above, at_least, at_most, below)}, got {value!r}")
    return value


def rising(
    low_name: str, low: object, high_name: str, high: object, *, zero: bool = False, infinite: bool = False
) -> tuple[float, float]:
    """Two positive numbers, the first at most the second. zero, infinite: whether they may be that."""
    first = number(low_name, low, at_least=0) if zero else number(low_name, low, above=0)
    second = number(high_name, high, above=0, infinite=infinite)
    if first > second:
        raise ValueError(f"{low_name}: expected a number of at most {high_name}, {second:g}, got {first:g}")
    return first, second


def seed(name: str, value: object) -> int:
    """value as an integer that torch takes as a seed, of 64 bits."""
    found = integer(name, value, -(2**63))
    if found >= 2**64:
        raise ValueError(f"{name}: expected an integer below 2**64, got {shown(found)}")
    return found


def sizes(name: str, value: object) -> None:
    """value is a sequence of sizes, integers of at least 0 (or symbolic ones)."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected a sequence of integers of at least 0, got {shown(value)}")
    for size in value:
        if not isinstance(size, torch.SymInt):
            integer(name, size, 0, 2**63 - 1)


def eps(value: object) -> float:
    """The `number` of at least 0 that norms add, by the short way of most calls."""
    if type(value) is float and 0 <= value < math.inf:
        return value
    return number("eps", value, at_least=0)


def boolean(name: str, value: object, *, optional: bool = False) -> None:
    """value is True or False, or None if that is an option."""
    if value is not True and value is not False and not (optional and value is None):
        raise TypeError(f"{name}: expected True{', False or None' if optional else ' or False'}, got {shown(value)}")


def function(name: str, value: object) -> None:
    """value can be called: a function or a module, not a class."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(f"{name}: expected a function or module, got {shown(value)}")


def floating_dtype(name: str, value: object) -> None:
    """value is a dtype of `floating` tensors."""
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype, got {shown(value)}")
    if value not in FLOATS:
        raise TypeError(f"{name}: expected bfloat16, float16, float32 or float64, got {_name(value)}")


def choice(name: str, value: T, options: Collection[T]) -> T:
    """value, which is one of options."""
    try:
        known = value in options
    except TypeError:  # without a hash
        known = False
    if not known:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, options))}, got {shown(value)}")
    return value


def pair(name: str, value: object, minimum: int = 1) -> tuple[int, int]:
    """One integer for both axes, or one for each: (rows, columns)."""
    if type(value) is int and value >= minimum:
        return value, value
    both = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value, value)
    if len(both) == 2:
        try:
            return integer(name, both[0], minimum), integer(name, both[1], minimum)
        except (TypeError, ValueError) as error:
            kind = type(error)
    else:
        kind = ValueError
    wanted = f"an integer of at least {minimum} or two of them (rows, columns)"
    raise kind(f"{name}: expected {wanted}, got {shown(value)}") from None


def device(name: str, value: object) -> torch.device:
    """value as a device that tensors can be made on here."""
    try:
        found = torch.device(value)  # type: ignore[call-overload]
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: expected a device that torch can use here, got {shown(value)}") from error
    return found


# Checks that need not run again


def remembered(check: Callable[..., T]) -> Callable[..., T]:
    """`check`, run once for all calls that are alike, since checks cost more host time than the operator's dispatch.

    Of a tensor `check` may look at shape, dtype and device only (the operator itself refuses sparse ones). What it
    returns is kept, an error is not. 7, 7.0 and True are not alike, nor are tuples of them.
    """
    known: dict[Hashable, T] = {}

    @functools.wraps(check)
    def call(*arguments: Any) -> T:
        if is_dynamo_compiling():  # which would trace the dictionary
            return check(*arguments)
        key = _key(arguments)
        try:
            return known[key]
        except KeyError:
            has_hash = True
        except TypeError:  # a symbolic size, or an argument that could change
            has_hash = False
        result = check(*arguments)
        if has_hash:
            if len(known) >= MOST_REMEMBERED:
                known.clear()
            known[key] = result
        return result

    return call


def _key(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """Equal only for arguments that are alike; without a hash where it can't tell."""
    key: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if argument is None or kind is int:
            key.append(argument)
        elif kind is bool or kind is float or kind is torch.dtype:
            key.append((kind, argument))
        elif isinstance(argument, Tensor):
            try:
                key.append((argument.shape, argument.dtype, argument.device))
            except RuntimeError:  # nested tensors have no shape
                key.append([argument])
        else:  # of what may change, or whose class may, no key: it is checked every time
            key.append(_key(argument) if isinstance(argument, (tuple, list)) else [argument])
    return tuple(key)


# Words of messages


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shown(value: object) -> str:
    """A wrong value, short."""
    if isinstance(value, Tensor):
        return "a tensor"
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _bounds(above: float, at_least: float, at_most: float, below: float) -> str:
    words = [f"above {above:g}"] * (above > -math.inf) + [f"of at least {at_least:g}"] * (at_least > -math.inf)
    words += [f"at most {at_most:g}"] * (at_most < math.inf) + [f"below {below:g}"] * (below < math.inf)
    return " ".join(["a number", " and ".join(words)]) if words else "a finite number"
