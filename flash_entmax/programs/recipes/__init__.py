"""Claims about models, each reproduced by one command: flash-entmax recipe NAME.

Needs matplotlib, rich, safetensors and scikit-learn: pip install ".[recipes]", from a clone.
"""

from .adapt.settings import AdaptSize
from .ruler.settings import RulerSize
from .settings import TRAINED, RecipeSettings


def check_arms(name: str, settings: RecipeSettings) -> None:
    """Refuse arms that the recipe does not have."""
    from . import sweep

    if name in TRAINED:
        sweep.chosen_arms(sweep.RECIPES[name], settings.arms)


def run(name: str, settings: RecipeSettings) -> None:
    """Do what is not in the results yet; write results, tables and pictures."""
    from . import mixture, sparsity, sweep, training_speed

    if name in TRAINED:
        sweep.run(sweep.RECIPES[name], settings)
    elif name == "sparsity":
        sparsity.run(settings)
    elif name == "mixture":
        mixture.run(settings)
    else:
        training_speed.run(settings)


def run_adapt(settings: RecipeSettings, size: AdaptSize) -> None:
    """The same for the recipe adapt, which writes the adapted models as well."""
    from .adapt import plan

    plan.run(settings, size)


def run_ruler(settings: RecipeSettings, size: RulerSize) -> None:
    """The same for the recipe ruler, which asks models that others have trained."""
    from .ruler import plan

    plan.run(settings, size)
