"""The search for the settings of the demo, with a table in the place of trainings."""

from benchmarks import tune_demo
from benchmarks.tune_demo import EXPLICIT, META_BATCH, META_LR, Tuner


def test_the_search_goes_from_the_best_to_the_best_and_runs_no_trial_twice(tmp_path, monkeypatch, capsys):
    trials = []

    def train(strategy, setting, seed, gigaflops):
        engine, meta_lr, _ = setting
        trials.append((setting, seed))
        value = 0.5 + 0.1 * (engine == EXPLICIT[1]) + 0.1 * (meta_lr == 2 * META_LR)
        return {"val": value - 0.05 * seed, "interval": 0.0, "steps": 1}

    monkeypatch.setattr(tune_demo, "train", train)
    for _ in range(2):
        Tuner("fomaml", 1.0, tmp_path / "tuning.jsonl").tune()
        printed = capsys.readouterr().out.splitlines()[-1]
        assert printed.startswith("fomaml: 70.0, 65.0, 60.0 % with") and "'inner_lr': 3.0" in printed
        assert f"'meta_lr': {2 * META_LR}, 'meta_batch': {META_BATCH}}}" in printed
        assert len(trials) == len((tmp_path / "tuning.jsonl").read_text().splitlines()) == len(EXPLICIT) + 4
