"""What scikit-learn expects of an estimator, without needing scikit-learn: parameters, points in and out, tags."""

import inspect
from typing import Any

import torch
from torch import Tensor


class Estimator:
    """Parameters are the arguments of ``__init__``, kept as they are; ``fit`` checks them."""

    @classmethod
    def parameter_names(cls) -> list[str]:
        return list(inspect.signature(cls.__init__).parameters)[1:]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of this object by name."""
        return {name: getattr(self, name) for name in self.parameter_names()}

    def set_params(self, **params: Any):
        """Change arguments, and return this object. ValueError for a name that is none of them."""
        names = self.parameter_names()
        for name in params:
            if name not in names:
                raise ValueError(f"parameters are {', '.join(names)}, got {name!r}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self).__init__).parameters
        given = self.get_params().items()
        changed = [f"{name}={value!r}" for name, value in given if value is not defaults[name].default]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_tags__(self):
        from sklearn.utils import Tags, TargetTags

        return Tags(estimator_type="density_estimator", target_tags=TargetTags(required=False))

    def check_fitted(self) -> None:
        if not hasattr(self, "n_features_in_"):
            raise not_fitted(f"this {type(self).__name__} is not fitted: call fit first")


def not_fitted(message: str) -> Exception:
    """scikit-learn's NotFittedError where it is installed; both are a ValueError."""
    try:
        from sklearn.exceptions import NotFittedError
    except ImportError:
        return ValueError(message)
    return NotFittedError(message)


def as_points(x: Any, features: int | None = None, name: str = "") -> Tensor:
    """A float64 tensor (points, features) of a tensor, on its device, or of what NumPy can read.

    ``features`` is what the estimator called ``name`` was fitted with.
    """
    points = x.detach() if isinstance(x, Tensor) else read_array(x)
    if points.is_complex():
        raise ValueError(f"Complex data not supported: x must be real, got {points.dtype}")
    if points.dim() != 2:
        advice = "Reshape your data: x.reshape(-1, 1) if it has one feature, x.reshape(1, -1) if it is one point"
        raise ValueError(f"x must have shape (points, features), got {tuple(points.shape)}. {advice}")
    count, width = points.shape
    if count == 0:
        raise ValueError(f"x must have at least one point, got shape {(count, width)}")
    if width == 0:
        raise ValueError(f"0 feature(s) (shape={(count, width)}) while a minimum of 1 is required.")
    if features is not None and width != features:
        raise ValueError(f"X has {width} features, but {name} is expecting {features} features as input")
    points = points.to(torch.float64)
    if not points.isfinite().all():
        raise ValueError("x must be finite, got NaN or inf")
    return points


def read_array(x: Any) -> Tensor:
    """What NumPy reads of lists, arrays and data frames."""
    if hasattr(x, "tocsr"):
        raise TypeError(f"x must be dense, got a sparse {type(x).__name__}: pass x.toarray()")
    import numpy

    array = numpy.asarray(x)
    if array.dtype.kind in "OUS":
        array = array.astype(numpy.float64)  # says which argument or string is no number
    elif array.dtype.kind not in "biufc":
        raise TypeError(f"x must hold numbers, got {array.dtype}")
    return torch.tensor(array.astype(numpy.complex128 if array.dtype.kind == "c" else numpy.float64))


def as_given(result: Tensor, x: Any) -> Any:
    """A tensor where ``x`` is one, else a NumPy array."""
    return result if isinstance(x, Tensor) else result.cpu().numpy()
