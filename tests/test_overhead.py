"""benchmarks/overhead.py: what is inside the networks of an iteration, and what is outside."""

import time

from short_runs import begin, configure, write_pictures

from benchmarks import overhead


def test_a_slow_network_is_inside_and_slow_data_is_outside(tmp_path):
    config = configure(write_pictures(tmp_path), "adversarial.kind=none", "fake_score.ttur=1")
    run = begin(config, tmp_path / "run")
    seconds, outside = overhead.measure(run, cycles=1)
    assert 0 < outside < seconds

    def busy(*_):
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass

    # What is added is compared with what was added: a first measure, and a machine's, differ.
    hook = run.parts.generator.network.register_forward_pre_hook(busy)  # after the benchmark's own
    seconds, outside = overhead.measure(run, cycles=1)
    hook.remove()
    assert seconds - outside > 0.5 > outside
    load, run.data = run.data, lambda iteration: (busy() or batch for batch in load(iteration))
    seconds, outside = overhead.measure(run, cycles=1)
    assert seconds > outside > 0.5 > seconds - outside
