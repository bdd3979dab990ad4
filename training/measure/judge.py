"""Which kind of answer a text is: a refusal of some category, or an answer."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline, make_union

from models.errors import EvaluationError
from training.data.rows import Row
from training.evaluation.statistics import Estimate, counted, missing

ANSWER = "answer"
FOLDS = 5


class Judge:
    """Tells what a text does, from how the training rows' responses are worded.

    It sees the text alone, never the prompt or the control token, so it can tell whether a text
    does what its token says.

    Attributes:
        name: Stands in reports.
        accuracy: Share of held-out texts judged rightly, by cross-validation. No text is in two
            folds.

    Args:
        rows: The training rows. Each distinct text counts once, rows without response do not.

    Raises:
        EvaluationError: All rows are of one kind.
    """

    name = "wording of the training responses (TF-IDF, logistic regression)"

    def __init__(self, rows: Iterable[Row]) -> None:
        kinds = {
            turn.content: turn.category or ANSWER
            for row in rows
            for turn in row.messages
            if turn.role == "assistant" and turn.content
        }
        labels = list(kinds.values())
        if len(set(labels)) < 2:
            raise EvaluationError(
                "the training rows hold only one kind of response; to judge texts both answers and "
                "refusals are needed"
            )
        self._pipeline = _pipeline()
        self.accuracy = _held_out_accuracy(list(kinds), labels)
        self._pipeline.fit(list(kinds), labels)

    def kinds(self, texts: Sequence[str]) -> list[str]:
        """Returns a category's name or `answer` for each text."""
        return [str(kind) for kind in self._pipeline.predict(list(texts))] if texts else []


def _pipeline() -> Pipeline:
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True),
    )
    return make_pipeline(
        features, LogisticRegression(C=20.0, max_iter=500, class_weight="balanced")
    )


def _held_out_accuracy(texts: Sequence[str], labels: Sequence[str]) -> Estimate:
    fewest = min(labels.count(kind) for kind in set(labels))
    if fewest < 2:
        return missing("the training rows hold a single text of some kind")
    folds = StratifiedKFold(min(FOLDS, fewest), shuffle=True, random_state=0)
    judged: Any = cross_val_predict(_pipeline(), list(texts), list(labels), cv=folds)
    return counted(int((judged == np.array(labels)).sum()), len(labels), "")
