"""A scikit-learn classifier: a perceptron trained by any rule, for pipelines, grid search and cross-validation."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from apical import models
from apical.bench import own_rules
from apical.bench.checkpoint import seeded
from apical.bench.names import make_rule, resolve
from apical.bench.plain_loop import train
from apical.bench.recipe import Recipe
from apical.core.credit import CreditRule
from apical.data import Dataset, Split
from apical.data.own.sources import moments
from apical.own_code import standard_settings


class CreditClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A ReLU perceptron trained by a credit-assignment rule.

    Features are standardised with the training data's mean and standard deviation. Rules get the command line's defaults
    (weight decay that aligns feedback, clipping). Training runs on the CPU in single precision, prediction in double.

    Args:
        rule: short name (`apical list rules`), "FILE.py:CLASS", "MODULE:CLASS", or a class.
        hidden: width of each hidden layer, or one width.
        epochs: passes over the training data.
        batch_size: samples per step; all of them if there are fewer.
        lr: learning rate.
        momentum: momentum of SGD, or beta1 of Adam.
        optimizer: "sgd", "adam", "adamw", "nadam", "radam", "input-adam" or "muon".
        rule_options: options of the rule by name.
        random_state: seed, generator or None, as in scikit-learn.

    Attributes:
        classes_: (n_classes,) labels.
        n_features_in_: number of features seen in `fit`.
        n_iter_: number of epochs trained.
        model_: the trained network, a plain `nn.Module` that maps standardised features (n, `n_features_in_`) to logits.
        rule_: the rule, whose `answer` gives the predictions; not the model's feed-forward pass if the rule settles.

    >>> from sklearn.datasets import load_digits
    >>> images, labels = load_digits(return_X_y=True)
    >>> classifier = CreditClassifier(rule="fa", hidden=(64,), epochs=5, random_state=0).fit(images[:1000], labels[:1000])
    >>> bool(classifier.score(images[1000:], labels[1000:]) > 0.8)
    True
    """

    def __init__(
        self,
        rule: str | type[CreditRule] = "pfa",
        hidden: int | Sequence[int] = (256, 256),
        epochs: int = 20,
        batch_size: int = 32,
        lr: float = 0.02,
        momentum: float = 0.9,
        optimizer: str = "sgd",
        rule_options: dict[str, Any] | None = None,
        random_state: Any = None,
    ) -> None:
        self.rule = rule
        self.hidden = hidden
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.momentum = momentum
        self.optimizer = optimizer
        self.rule_options = rule_options
        self.random_state = random_state

    @standard_settings()
    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train on samples (n, features) with labels (n,).

        Raises:
            ValueError: samples or labels are not usable: NaN, wrong shapes, a single class.
            ApicalError: a name or an option is not usable, or training diverged.
        """
        checked: tuple[NDArray[np.float64], NDArray[Any]] = validate_data(self, X, y, dtype=np.float64)
        x, targets = checked
        check_classification_targets(targets)
        self.classes_, labels = np.unique(targets, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"CreditClassifier needs at least two classes; the data have one class in {len(targets)} samples"
            )
        mean, deviation, _ = moments(torch.tensor(x), (0,))
        self.mean_, self.scale_ = mean[0].numpy(), deviation[0].numpy()
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        samples = Split(self._standardised(x).float(), torch.from_numpy(labels.astype(np.int64)))
        recipe = Recipe(
            rule=self.rule if isinstance(self.rule, str) else own_rules.remember(self.rule),
            rule_options=tuple(f"{key}={value!r}" for key, value in (self.rule_options or {}).items()),
            model="-".join(["mlp", *map(str, np.atleast_1d(self.hidden))]),
            epochs=self.epochs,
            batch_size=min(self.batch_size, len(targets)),
            optimizer=self.optimizer,  # type: ignore[arg-type]
            lr=(float(self.lr),),
            momentum=self.momentum,
            drop_last=False,
            probe=0,
            seed=seed,
            data="the samples given",
        )
        recipe, _ = resolve(recipe, len(targets), len(self.classes_))
        dataset = Dataset("the samples given", samples, None, samples, len(self.classes_), (), (), "given to fit")
        with seeded(seed):
            shape = (x.shape[1],)
            rule = make_rule(recipe, models.build(recipe.model, shape, len(self.classes_)), shape)
            train(rule, recipe, dataset)
        self.model_: nn.Module = rule.detach()
        self.rule_: CreditRule = rule.double().eval()
        self.n_iter_ = self.epochs
        return self

    @standard_settings()
    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the probabilities (n, n_classes) of samples (n, features)."""
        check_is_fitted(self)
        x: NDArray[np.float64] = validate_data(self, X, reset=False, dtype=np.float64)
        with torch.no_grad():
            probabilities: NDArray[np.float64] = self.rule_.answer(self._standardised(x)).softmax(1).numpy()
        return probabilities

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the labels (n,) of samples (n, features)."""
        indices = self.predict_proba(X).argmax(axis=1)
        labels: NDArray[Any] = self.classes_[indices]
        return labels

    def _standardised(self, x: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy((x - self.mean_) / self.scale_)
