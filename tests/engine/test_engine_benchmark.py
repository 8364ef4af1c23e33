"""The benchmark of a served engine, around a model that is one sum: that it runs to its end and sees every token."""

from pathlib import Path

from engine_bench import settings_for
from engine_cases import FACTS, SumRunner

from benchmarks.engine_client import Load
from benchmarks.engine_service import measure
from benchmarks.vocabulary import CONTROL, write_tokenizer
from services.postproc.text.detokenize import Vocabulary
from shared.messages import Sampling
from shared.model.tokenizer import Tokenizer


def test_every_load_is_answered_and_timed() -> None:
    settings = settings_for("unix:///filled-in", max_num_seqs=8)
    greedy = Sampling(seed=0, temperature=0.0, ignore_eos=True)
    loads = [
        Load(redis_url="", namespace="", requests=n, sampling=greedy, prompt=20, generated=80, ids=(10, 100))
        for n in (1, 8)
    ]
    passages = measure((SumRunner(256, settings.block_size), 256), settings, FACTS, loads)
    assert len(passages) == 2
    assert all(passage.step_ms > 0 and passage.delta_ms["p99"] > 0 for passage in passages)


def test_every_id_but_the_control_tokens_is_a_word_of_its_own(tmp_path: Path) -> None:
    size = 5000
    write_tokenizer(tmp_path, size)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == size
    plain, words = Vocabulary(tokenizer).plain, range(len(CONTROL) + 256, size)
    assert len({plain[token] for token in words}) == len(words)
