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
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass

    hook = run.parts.generator.network.register_forward_pre_hook(busy)  # after the benchmark's own
    slower, still = overhead.measure(run, cycles=1)
    hook.remove()
    assert slower > seconds + 0.2 and still < outside + 0.1
    load, run.data = run.data, lambda iteration: (busy() or batch for batch in load(iteration))
    slower, more = overhead.measure(run, cycles=1)
    assert slower > seconds + 0.2 and more > outside + 0.2
