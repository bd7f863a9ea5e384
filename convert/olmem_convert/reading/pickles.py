"""Pickles read without a line of them being run: what `torch.save` writes, and the names of keys in OLMo's safetensors.

A pickle is a program of a small machine. `Machine` knows those of its instructions that such files use and the names
that its caller lists, which stand for plain values and records; of anything else it makes an error. What is made is
counted as it is made, so that memory and time stay in proportion to the file, whatever sizes it claims. What a state
dict may name stands at the end.
"""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pickletools import genops
from sys import getsizeof
from typing import Any

import torch

LONGEST_KEY = 2**12  # characters of a key of a dictionary
LARGEST_PICKLE = 2**27  # bytes; the names and shapes of 100,000 tensors take 2**25
# Bytes of memory that what a pickle makes may take: so many for any, more for each byte of it, and never more than.
# The index of a sharded checkpoint takes 13 for each of its bytes.
FOR_ANY, FOR_EACH_BYTE, MOST_MEMORY = 2**25, 18, 6 * 2**27
PLACE = 8  # bytes of a value's place in a list
MOST_HEIGHT = 2**20  # values on the stack at once; what writes pickles takes them off by the thousand
ENTRY = 40  # bytes of an entry of a dictionary
MOST_DIMENSIONS = 64  # of a tensor, in torch too
PLAIN = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
    )
)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
OTHERS = (
    *("PROTO", "FRAME", "MARK", "POP", "POP_MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"),
    *("GET", "BINGET", "LONG_BINGET", "TUPLE", "LIST", "APPEND", "APPENDS", "DICT", "SETITEM", "SETITEMS"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
)
INSTRUCTIONS = {"STOP", *PLAIN, *CONSTANTS, *EMPTY, *TUPLES, *OTHERS}


class Record:
    """An inert stand-in for a pickled object: its state, nothing else."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__ = state  # not a copy: an index has hundreds of thousands
        else:
            self.state = state


class Names(dict):
    """In place of OrderedDict, whose attributes (`_metadata` of a state dict) do not matter."""

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...


def plain_key(key: Any) -> Any:
    """A key of a dictionary. Others take for ever to hash, as tuples of tuples do, each twice in the next, or to find,
    as large numbers of one hash."""
    if type(key) is Record or (type(key) is str and len(key) <= LONGEST_KEY) or (type(key) is int and 0 <= key < 2**32):
        return key
    raise pickle.UnpicklingError(f"a {type(key).__name__} is a key of a dictionary")


def plain_size(values: Any) -> tuple[Any, ...]:
    """In place of torch.Size; no more dimensions than torch has, so that copies do not add up."""
    if not isinstance(values, tuple | list) or len(values) > MOST_DIMENSIONS:
        raise pickle.UnpicklingError("a size is no tuple of a tensor's dimensions")
    return tuple(values)


class Machine:
    """Runs one pickle. `names` is all that it may name; `load_storage` makes something of persistent ids."""

    def __init__(self, data: bytes, names: Mapping[str, Any], load_storage: Callable[[Any], Any] | None):
        self.data, self.names, self.load_storage = data, names, load_storage
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: list[Any] = []
        self.left = min(FOR_ANY + FOR_EACH_BYTE * len(data), MOST_MEMORY)

        self.instructions: dict[str, Callable[[Any], object]] = {
            **dict.fromkeys(PLAIN, self.push),
            **{name: partial(self.put_constant, value) for name, value in CONSTANTS.items()},
            **{name: partial(self.put_empty, kind) for name, kind in EMPTY.items()},
            **{name: partial(self.put_tuple, number) for name, number in TUPLES.items()},
            **{name: getattr(self, f"do_{name.lower()}") for name in OTHERS},
        }

    def run(self) -> Any:
        """Runs the instructions up to STOP, and returns what is on the stack then."""
        stack, instructions = self.stack, self.instructions
        for opcode, argument, _ in genops(self.data):
            name = opcode.name
            if name == "STOP":
                return self.taken(1)[0]
            if name not in instructions:
                raise pickle.UnpicklingError(f"the instruction {name} has no place in such a file")
            instructions[name](argument)
            if len(stack) > MOST_HEIGHT:
                raise pickle.UnpicklingError("it puts far more aside than such a file does")
        raise pickle.UnpicklingError("it has no end")

    def put_constant(self, value: Any, _: Any) -> None:
        self.stack.append(value)

    def put_empty(self, kind: Callable[[], Any], _: Any) -> None:
        self.push(kind())

    def put_tuple(self, number: int, _: Any) -> None:
        self.push(tuple(self.taken(number)))

    def charge(self, nbytes: int) -> None:
        """Takes bytes from those that the pickle may make, and raises UnpicklingError when none are left."""
        self.left -= nbytes
        if self.left < 0:
            raise pickle.UnpicklingError("it makes far more than such a file holds")

    def push(self, value: Any) -> None:
        """Puts what was made on the stack, with its own size counted; what it holds was counted when it was made."""
        self.charge(getsizeof(value))
        self.stack.append(value)

    def taken(self, number: int) -> list[Any]:
        """The last so many values of the stack, none of them below the last mark."""
        start = len(self.stack) - number
        if start < (self.marks[-1] if self.marks else 0):
            raise pickle.UnpicklingError("it takes what is not on the stack")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def since_mark(self) -> list[Any]:
        """All values above the last mark, which goes too."""
        if not self.marks:
            raise pickle.UnpicklingError("it goes back to a mark that it has not made")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def peek(self) -> Any:
        """Returns what is last on the stack, and above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise pickle.UnpicklingError("it uses what is not on the stack")
        return self.stack[-1]

    def top(self, *kinds: type) -> Any:
        """What is last on the stack, of one of these kinds."""
        value = self.peek()
        if type(value) not in kinds:
            raise pickle.UnpicklingError(f"something is put into a {type(value).__name__}")
        return value

    def do_proto(self, version: int) -> None:
        if version > pickle.HIGHEST_PROTOCOL:
            raise pickle.UnpicklingError(f"its protocol is {version}")

    def do_frame(self, _: Any) -> None: ...

    def do_mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))
        if len(self.marks) > MOST_HEIGHT:
            raise pickle.UnpicklingError("it nests far deeper than such a file does")

    def do_pop(self, _: Any) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.taken(1)

    def do_pop_mark(self, _: Any) -> None:
        self.since_mark()

    def do_memoize(self, _: Any) -> None:
        self.do_put(len(self.memo))

    def do_put(self, place: int) -> None:
        value = self.peek()
        if place == len(self.memo):
            self.charge(2 * PLACE)
            self.memo.append(value)
        elif 0 <= place < len(self.memo):
            self.memo[place] = value
        else:
            raise pickle.UnpicklingError(f"its memo has no place {place} yet")

    do_binput = do_long_binput = do_put

    def do_get(self, place: int) -> None:
        if not 0 <= place < len(self.memo):
            raise pickle.UnpicklingError(f"its memo has no place {place}")
        self.stack.append(self.memo[place])

    do_binget = do_long_binget = do_get

    def do_tuple(self, _: Any) -> None:
        self.push(tuple(self.since_mark()))

    def do_list(self, _: Any) -> None:
        self.push(self.since_mark())

    def do_append(self, _: Any) -> None:
        values = self.taken(1)
        self.top(list).extend(values)
        self.charge(2 * PLACE)

    def do_appends(self, _: Any) -> None:
        values = self.since_mark()
        self.top(list).extend(values)
        self.charge(2 * PLACE * len(values))

    def do_dict(self, _: Any) -> None:
        items = self.since_mark()
        self.push({})
        self.set_items(items)

    def do_setitem(self, _: Any) -> None:
        self.set_items(self.taken(2))

    def do_setitems(self, _: Any) -> None:
        self.set_items(self.since_mark())

    def set_items(self, items: list[Any]) -> None:
        """Puts keys and values into the dictionary that is last on the stack."""
        held = self.top(dict, Names)
        self.charge(ENTRY * (len(items) // 2))
        for key, value in zip(items[::2], items[1::2], strict=True):
            held[plain_key(key)] = value

    def do_global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.do_name(module, name)

    def do_stack_global(self, _: Any) -> None:
        self.do_name(*self.taken(2))

    def do_name(self, module: Any, name: Any) -> None:
        """Puts what a name stands for on the stack, if it is one of those that the caller lists."""
        if f"{module}.{name}" not in self.names:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no tensor needs: do not load it with other code either"
            )
        self.stack.append(self.names[f"{module}.{name}"])

    def do_reduce(self, _: Any) -> None:
        made, arguments = self.taken(2)
        if not callable(made) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls what is no function")
        self.push(made(*arguments))

    def do_newobj(self, _: Any) -> None:
        made, arguments = self.taken(2)
        if made not in (Record, Names) or arguments:
            raise pickle.UnpicklingError("it makes an object of another class")
        self.push(made())

    def do_build(self, _: Any) -> None:
        [state] = self.taken(1)
        self.top(Record, Names).__setstate__(state)

    def do_binpersid(self, _: Any) -> None:
        if self.load_storage is None:
            raise pickle.UnpicklingError("persistent ids have no place here")
        [pid] = self.taken(1)
        self.push(self.load_storage(pid))


def unpickle(data: bytes, names: Mapping[str, Any], load_storage: Callable[[Any], Any] | None = None) -> Any:
    """The value that a pickle makes, or UnpicklingError."""
    try:
        return Machine(data, names, load_storage).run()
    except pickle.UnpicklingError:
        raise
    except Exception as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Storage:
    """A file of the archive, and the dtype of its numbers; of untyped ones none."""

    key: str
    dtype: torch.dtype | None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a state dict has it: which numbers of a storage, in which order."""

    storage: Storage
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def load_storage(pid: Any) -> Storage:
    """Makes of a persistent id the storage that it names."""
    kind, dtype, key, _, _ = pid
    if kind != "storage" or not isinstance(dtype, torch.dtype | None) or not isinstance(key, str):
        raise pickle.UnpicklingError("a storage is of another kind")
    return Storage(key, dtype)


def rebuild_tensor(
    storage: Any, first: Any, shape: Any, stride: Any, requires_grad: Any = False, hooks: Any = None, flags: Any = None
) -> StoredTensor:
    """Stands for the function of torch that puts a tensor of a typed storage together."""
    return rebuild_typed(storage, first, shape, stride, requires_grad, hooks, storage.dtype, flags)


def rebuild_typed(
    storage: Any, first: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, flags: Any = None
) -> StoredTensor:
    """Stands for the function of torch that is given the dtype too. It checks what it is given."""
    if len(shape) != len(stride) or len(shape) > MOST_DIMENSIONS:
        raise pickle.UnpicklingError(f"a tensor has more than {MOST_DIMENSIONS} dimensions, or not as many strides")
    numbers = (first, *shape, *stride)
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor is not put together as torch does it")
    if flags or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise pickle.UnpicklingError("a tensor is conjugated, negated or of impossible sizes")
    return StoredTensor(storage, first, tuple(shape), tuple(stride), dtype)


def rebuild_nothing(dtype: Any, shape: Any, stride: Any, requires_grad: Any) -> StoredTensor:
    """Stands for the function of torch that makes a tensor without numbers."""
    return rebuild_tensor(Storage("of the device meta, which holds nothing", dtype), 0, shape, stride)


def rebuild_parameter(data: Any, *_: Any) -> Any:
    """Stands for the function of torch that makes a parameter of a tensor, which it leaves as it is."""
    return data


def rebuild_subclass(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Stands for the function of torch that makes a tensor of a subclass, whose state does not matter."""
    if rebuild not in (rebuild_tensor, rebuild_typed):
        raise pickle.UnpicklingError("a tensor is of a class of its own")
    return rebuild(*arguments)


DTYPES = {
    **{f"{name}Storage": getattr(torch, name.lower()) for name in ("Double", "Float", "Half", "Long", "Int", "Short")},
    **{"BFloat16Storage": torch.bfloat16, "CharStorage": torch.int8, "ByteStorage": torch.uint8},
    "BoolStorage": torch.bool,
}
TORCH_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
# All that a state dict of torch 1.6 and later may name; the functions become those above.
STATE_DICT_NAMES: dict[str, Any] = {
    "collections.OrderedDict": Names,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_typed,
    "torch._utils._rebuild_meta_tensor_no_storage": rebuild_nothing,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": rebuild_subclass,
    "torch.nn.parameter.Parameter": None,
    "torch.Tensor": None,
    "torch.storage.UntypedStorage": None,
    "torch.Size": plain_size,
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
    **TORCH_DTYPES,
}
