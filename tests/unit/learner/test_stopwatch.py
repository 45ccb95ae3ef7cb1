import time

from nemo_cascade.learner.stopwatch import Stopwatch


def test_parts_of_a_step_add_up_under_the_name_of_what_they_are_part_of():
    watch = Stopwatch()
    for _ in range(2):
        with watch.measure("forward"):
            time.sleep(0.01)
    metrics = watch.metrics()
    assert list(metrics) == ["seconds/training/forward"]
    assert metrics["seconds/training/forward"] >= 0.02
