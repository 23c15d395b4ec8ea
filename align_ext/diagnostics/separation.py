"""How well points tell the tasks apart, in numbers and as a map; both need scikit-learn."""

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

_FOLDS, _PERPLEXITY = 5, 30.0


@dataclass(frozen=True)
class Separation:
    """Numbers to stand beside a map of points.

    Attributes:
        accuracy: of a linear probe on points that it was not fitted on, cross-validated.
        chance: the accuracy of naming the commonest task.
        silhouette: mean silhouette of the points with their tasks as clusters, in [-1, 1]; 0: the tasks overlap.
    """

    accuracy: float
    chance: float
    silhouette: float


def separation(points: Tensor, tasks: Tensor) -> Separation:
    """Measures how well points tell their tasks apart.

    The probe is multinomial logistic regression (C = 1) on dimensions of mean 0 and variance 1, in stratified folds of
    a fixed order: 5, or as many as the smallest task has points. The silhouette of a point is (b - a) / max(a, b), a
    its mean distance to its own task's points, b that to the nearest other task's (Rousseeuw 1987).

    Args:
        points: [E, d], as example_latents returns them.
        tasks: int64 [E].

    Raises:
        ValueError: there are less than two tasks, a task has less than two points, or scikit-learn is not installed.
    """
    _need_sklearn("separation")
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import silhouette_score
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = points.double().numpy(), tasks.numpy()
    _, counts = tasks.unique(return_counts=True)
    if len(counts) < 2 or int(counts.min()) < 2:
        raise ValueError(
            f"the points of {len(counts)} tasks, {int(counts.min())} of the smallest, tell nothing: give two points or "
            "more of each of two tasks or more"
        )
    folds = StratifiedKFold(min(_FOLDS, int(counts.min())), shuffle=True, random_state=0)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    accuracy = cross_val_score(probe, x, y, cv=folds).mean()
    return Separation(float(accuracy), int(counts.max()) / len(y), float(silhouette_score(x, y)))


def tsne(points: Tensor) -> Tensor:
    """Maps points into the plane by t-SNE (van der Maaten and Hinton 2008), the exact method, from their PCA.

    Distances and sizes of clusters in the map mean nothing; its random numbers are fixed, so that the same points give
    the same map.

    Args:
        points: [E, d], E >= 4; time and memory grow with E².

    Returns:
        [E, 2], float64.

    Raises:
        ValueError: there are less than four points, or scikit-learn is not installed.
    """
    _need_sklearn("tsne")
    from sklearn.manifold import TSNE

    if len(points) < 4:
        raise ValueError(f"t-SNE of {len(points)} points has no meaning: give four or more")
    perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
    method = TSNE(init="pca", method="exact", perplexity=perplexity, random_state=0)
    return torch.from_numpy(method.fit_transform(points.double().numpy())).double()


def _need_sklearn(function: str) -> None:
    if importlib.util.find_spec("sklearn") is None:
        raise ValueError(f"{function} needs scikit-learn: pip install 'align_ext[study]'")
