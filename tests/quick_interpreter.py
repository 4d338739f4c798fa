"""Triton's interpreter without what it finds out again and again: patches, types, shapes. Results keep their bits."""

from dataclasses import replace

from quick_arithmetic import NUMBERS, TYPES_TAKEN, compute_at_once


def quicken_the_interpreter() -> None:
    """Leaves out what Triton's interpreter does again and again to no effect; results keep their bits."""
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    patch_once(interpreter)
    forget_overflow(interpreter.interpreter_builder)
    remember_types(interpreter)
    if hasattr(TritonSemantic, "_cast_to_computation_type"):  # not in Triton 3.6
        know_same_types()
    unwrap_by_type()
    call_builtins_directly(interpreter)
    compute_at_once(interpreter)


def patch_once(interpreter) -> None:
    """Triton's interpreter patches triton.language for each kernel, takes it back, and patches it again, to the same
    effect, for each call of a jit function inside: half of its time. Here one patch, never taken back, serves all
    functions of a module."""
    patch_lang, patched = interpreter._patch_lang, set()

    class Kept:
        def restore(self) -> None:
            pass

    def patch_module(function):
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch_lang(function)
        return Kept()

    def call(self, *args, **kwargs):
        if self.fn.__module__.startswith("triton."):
            patch_module(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_lang = patch_module
    interpreter.InterpretedFunction.__call__ = call


def forget_overflow(builder) -> None:
    """Each sum and product of integers is made again in 64 bits, for a check that only the option debug turns on."""
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def remember_types(interpreter) -> None:
    """Types and shapes of values are made anew for each operation, from few that differ."""
    from triton.language import core

    numpy_dtype, dtypes = interpreter._get_np_dtype, {}

    def numpy_dtype_of(type):
        if type.name not in dtypes:
            dtypes[type.name] = numpy_dtype(type)
        return dtypes[type.name]

    interpreter._get_np_dtype = numpy_dtype_of
    make_block, blocks, shapes = core.block_type.__init__, {}, {}

    def plain(number):
        return number.value if isinstance(number, core.constexpr) else number

    def block(self, element_type, shape) -> None:
        key = element_type.name, *map(plain, plain(shape))
        if key not in blocks:
            make_block(self, element_type, shape)
            self.shape = shapes.setdefault(key[1:], self.shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    make_tensor, tensors = core.tensor.__init__, {}

    def tensor(self, handle, type) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = {name: of_type for name, of_type in vars(self).items() if name != "handle"}
        vars(self).update(tensors[type.name], handle=handle)

    core.block_type.__init__, core.tensor.__init__ = block, tensor


def know_same_types() -> None:
    """Most operations have operands of one type and one shape, or a number that takes the other operand's type: there
    is nothing to find out, cast or broadcast. Shapes of equal sizes are one object: see remember_types."""
    from triton.language.core import tensor
    from triton.language.semantic import TritonSemantic

    convert_both, broadcast_both = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value

    def takes_type_of(number, value) -> bool:
        if type(value) is not tensor:
            return False
        return value.dtype.name in TYPES_TAKEN.get(type(number), ())

    def convert(self, left, right, *options, **more):
        if type(left) is type(right) is tensor:
            if not left.dtype.name == right.dtype.name in ("int1", *NUMBERS):
                return convert_both(self, left, right, *options, **more)
        elif takes_type_of(right, left):
            right = self._cast_to_computation_type(right, left.dtype)
        elif takes_type_of(left, right):
            left = self._cast_to_computation_type(left, right.dtype)
        else:
            return convert_both(self, left, right, *options, **more)
        return self.broadcast_impl_value(left, right)

    types = {}

    def splat(self, scalar, block):
        key = block.name, scalar.dtype.name
        if key not in types:
            types[key] = block.with_element_ty(scalar.dtype)
        return self.make_tensor(self.builder.create_splat(types[key], scalar.handle), types[key])

    def broadcast(self, left, right):
        left_shape, right_shape = (getattr(value.type, "shape", None) for value in (left, right))
        if left_shape is right_shape:
            return left, right
        if right_shape is None:
            return left, splat(self, right, left.type)
        if left_shape is None:
            return splat(self, left, right.type), right
        return broadcast_both(self, left, right)

    TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value = convert, broadcast


def unwrap_by_type() -> None:
    """Most of what Triton looks at for a constant in it is a number, a type or a value."""
    from triton.language import core

    unwrap = core._unwrap_if_constexpr
    bare = {int, float, bool, str, core.dtype, core.block_type, core.pointer_type, core.tensor}

    def quick_unwrap(value):
        return value if type(value) in bare else unwrap(value)

    core._unwrap_if_constexpr = quick_unwrap


def call_builtins_directly(interpreter) -> None:
    """A builtin gets the semantic that the interpreter has, without a look at what it got."""

    def patch(obj, name, member, builder, scope) -> None:
        function, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch
