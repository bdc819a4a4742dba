"""ROUGE-L for lm-eval's summary tasks."""

from typing import Any


def rouge_l(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE-L F1 between the generated and the reference summary, stemmed, 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    score = RougeScorer(["rougeL"], use_stemmer=True).score(doc["summary"], results[0])
    return {"rougeL": score["rougeL"].fmeasure}
