"""Error messages for users: one sentence that names what is wrong, where, and the remedy."""

import difflib
import os
from collections.abc import Iterable
from numbers import Integral


class ApicalError(Exception):
    """Base of every error that the command line prints as one line (no traceback) before it exits with a non-zero status."""


class ConfigError(ApicalError, ValueError):
    """An option, a name or a combination of them is not usable."""


class DataError(ApicalError, ValueError):
    """A data set is missing, damaged or does not fit (shape, labels, NaN)."""


class UnsupportedModelError(ApicalError, TypeError):
    """A module of the model cannot be trained by the chosen rule; the message names the module and the remedy."""


class CheckpointError(ApicalError, ValueError):
    """A checkpoint or run folder is damaged or does not belong to the requested run."""


class DivergenceError(ApicalError, ArithmeticError):
    """Training produced NaN or infinity."""


class InstabilityError(DivergenceError):
    """A simulated dynamical system or its controller is unstable at these settings; the message names what to change."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for an unknown rule, model or data set, with the nearest known name.

    >>> str(unknown_name("rule", "pfaa", ["bp", "pfa"]))
    "unknown rule 'pfaa'; did you mean 'pfa'? Known: bp, pfa"
    >>> str(unknown_name("model", "mpl-64", ["lenet", "mlp-<widths>"]))
    "unknown model 'mpl-64'; did you mean 'mlp-<widths>'? Known: lenet, mlp-<widths>"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    if not near:  # names with a parameter, such as mlp-<widths>: compare the part before it
        stems = {known_name.split("-")[0]: known_name for known_name in names}
        near = [stems[stem] for stem in difflib.get_close_matches(name.lower().split("-")[0], stems, n=1, cutoff=0.6)]
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ConfigError(f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}")


def warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning in one line, as the command line prints errors; `warnings.formatwarning` can be this function.

    Its place in the code is given only outside installed packages and apical, whose lines say nothing to the user.

    >>> warning_line("the rate is large", UserWarning, "my_rule.py", 8)
    'apical: warning: my_rule.py, line 8: the rate is large\\n'
    >>> warning_line("the rate is large", UserWarning, __file__, 8)
    'apical: warning: the rate is large\\n'
    """
    inside = "site-packages" in filename or filename.startswith(os.path.dirname(os.path.abspath(__file__)))
    place = "" if inside else f"{filename}, line {lineno}: "
    return f"apical: warning: {place}{' '.join(str(message).split())}\n"


def out_of_memory(error: BaseException) -> str | None:
    """Return what to say of an out-of-memory error; None for any other.

    >>> out_of_memory(MemoryError())
    'out of memory: take a smaller model, smaller batches or fewer --jobs; what was saved is kept'
    """
    is_it = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # the latter is torch's, of GPUs
    if not is_it and "can't allocate memory" not in str(error):
        return None
    return "out of memory: take a smaller model, smaller batches or fewer --jobs; what was saved is kept"


def refuse_second_derivatives() -> None:
    """Refuse second derivatives; called in a backward pass whose results are not derivatives.

    Raises:
        ConfigError: the pass records a graph (`create_graph=True`).
    """
    import torch

    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise ConfigError(
            "gradients of gradients (create_graph=True) exist only under backpropagation: what this rule propagates is "
            "not a derivative of the loss, so it has no second derivative; leave out create_graph, or use Backprop"
        )


def refuse_transforms(rule: str) -> None:
    """Refuse to work within a transform of `torch.func`, which does not see what a rule does to a graph.

    Raises:
        ConfigError: a transform is active.
    """
    import torch

    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise ConfigError(
            f"{rule} does not work under the transforms of torch.func (grad, vmap); call backward() on the loss, also "
            "with torch.func.functional_call"
        )


def require_count(option: str, value: object, least: int = 1) -> None:
    """Refuse a value that is not a whole number of at least `least`.

    Raises:
        ConfigError: names the option.

    >>> require_count("sweeps", 1.5)
    Traceback (most recent call last):
    apical.errors.ConfigError: sweeps must be a whole number, at least 1, not 1.5
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{option} must be a whole number, at least {least}, not {value!r}")


def require_choice(option: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is not one of an option's choices.

    Raises:
        ConfigError: as returned by :func:`unknown_name`.

    >>> require_choice("feedback", "ful", ["full", "broadcast"])
    Traceback (most recent call last):
    apical.errors.ConfigError: unknown feedback 'ful'; did you mean 'full'? Known: broadcast, full
    """
    choices = list(choices)
    if value not in choices:
        raise unknown_name(option, str(value), choices)
