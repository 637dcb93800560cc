"""Functions of the task in the YAML beside this file, as lmms-eval calls them."""


def doc_to_visual(doc):
    return [picture.convert("RGB") for picture in doc["pictures"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    """Exact match, in all and by kind of question, as pipeline.evaluation.scoring.exact_match."""
    right = float(results[0].strip() == doc["answer"].strip())
    return {"exact_match": right, f"exact_match_{doc['kind']}": right}
