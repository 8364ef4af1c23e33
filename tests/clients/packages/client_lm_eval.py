"""lm-evaluation-harness, unmodified: `local-completions` with the tokenizer of the server, on tasks of our own.

What is right in them is what the model itself goes on with, so a score below 1 means that texts were rated or continued
in another way than they are written.
"""

import json

import lm_eval
import pytest
import requests
from asks import BASE_URL, FACT, MODEL
from lm_eval.tasks import TaskManager

BEGINNINGS = [" ".join(FACT.split()[:count]) for count in (4, 7, 10)]
OTHERS = ["zebra 7 7 7", "{}{}", "\u20ac\u20ac n\u00e4her"]
TASKS = {
    "rate": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "go_on": {
        "output_type": "generate_until",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    },
    "roll": {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{prompt}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


def continued(prompt):
    # A line: what comes behind it is a special token, which no text is rated as.
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0, "stop": "\n"}
    return requests.post(f"{BASE_URL}/v1/completions", json=asked, timeout=180).json()["choices"][0]["text"]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = []
    for place, prompt in enumerate(BEGINNINGS):
        text = continued(prompt)
        choices = [*OTHERS[:place], text, *OTHERS[place:]]
        rows.append({"prompt": prompt, "text": text, "choices": choices, "answer": place})
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    files = {"test": str(tmp_path / "rows.json")}
    for name, task in TASKS.items():
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
        both = {"doc_to_text": "" if name == "roll" else "{{prompt}}", "target_delimiter": ""}
        (folder / f"{name}.yaml").write_text(json.dumps({**common, **both, **task}))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_local_completions(tasks, batch_size):
    options = {"model": MODEL, "base_url": f"{BASE_URL}/v1/completions", "tokenizer_backend": "auto", "max_length": 512}
    done = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=options,
        tasks=list(TASKS),
        task_manager=tasks,
        batch_size=batch_size,
        bootstrap_iters=0,
    )
    found = done["results"]
    assert found["rate"]["acc,none"] == 1
    assert found["go_on"]["exact_match,none"] == 1
    assert 1 < found["roll"]["word_perplexity,none"] < 1e9
