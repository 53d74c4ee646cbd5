"""compare.py at a tiny size: every method trains, the sweep finds its way, the table is whole."""

import pytest

import bench_optim
import compare

pytest.importorskip("peft")
pytest.importorskip("matplotlib")


@pytest.fixture
def tiny(monkeypatch):
    """Make the models, texts and trainings tiny."""
    sizes = {
        "N_LAYER": 1,
        "N_EMBD": 64,
        "CTX_LEN": 32,
        "PRETRAINING_STEPS": 2,
        "STEPS": 5,
        "EVALUATE_EVERY": 1,
        "LEARNING_RATES": (3e-3, 1e-2),
        "FIRST_TRIED": (3e-3, 1e-2),
        "TIMED_STEPS": 2,
        "SEEDS": 2,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(compare, name, value)
    read_texts = compare.read_texts

    def short_texts(seed):
        texts = read_texts(seed)
        texts.validation, texts.test = texts.validation[:500], texts.test[:500]
        return texts

    monkeypatch.setattr(compare, "read_texts", short_texts)


@pytest.mark.usefixtures("tiny")
def test_all_methods_at_a_tiny_size(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    compare.main(seed=0)
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"][2:]
    trained = {row[1].strip(): row[2].strip() for row in rows}
    assert list(trained) == [*compare.METHODS]
    # Bone and LoRA train as many numbers, more than time and ln alone, fewer than all.
    assert trained["Bone (bat)"] == trained["Bone (shard)"] == trained["LoRA"]
    numbers = {name: int(text.replace(",", "")) for name, text in trained.items()}
    assert numbers["time and ln alone"] < numbers["LoRA"] < numbers["all weights"]
    assert {row[1].strip(): row[6].strip() for row in rows}["LoRA"] == "+0.000, +0.000"


@pytest.mark.usefixtures("tiny")
def test_the_optimizers_are_compared_on_it_too(monkeypatch, capsys):
    monkeypatch.setattr(bench_optim, "STEPS", 3)
    monkeypatch.setattr(bench_optim, "SEEDS", 1)
    bench_optim.main(["quality"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:2] == "0."]
    assert [row[0] for row in rows] == ["0.001", "0.003"]
    assert all(row[-1] == "met" for row in rows)


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1e-3, [3e-4, 1e-3, 3e-3, 1e-2]),
        (3e-2, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
        (1e-4, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
        (1.0, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]),  # no more are known
    ],
)
def test_the_sweep_goes_on_until_the_best_rate_has_neighbours(monkeypatch, best, tried):
    def fine_tune(base, texts, method, *, lr, seed):
        distance = abs(compare.LEARNING_RATES.index(lr) - compare.LEARNING_RATES.index(best))
        return compare.Run([0], [0.0], distance)

    monkeypatch.setattr(compare, "fine_tune", fine_tune)
    runs = compare.sweep(None, None, "LoRA", seed=0)
    assert list(runs) == tried
    assert compare.best_rate(runs) == best
