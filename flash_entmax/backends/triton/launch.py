"""How a kernel is launched."""

from .schedule import Config, Launch


def launch(kernel, programs: int, setting: Launch, config: Config, *arguments) -> None:
    """Run so many programs of a kernel, whose last argument is its Config."""
    kernel[(programs,)](*arguments, C=config, **setting.options, enable_fp_fusion=True)
