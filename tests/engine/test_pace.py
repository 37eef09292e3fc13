from latentkv.engine.pace import FIRST_STEP_TOKENS, MIN_STEP_TOKENS, Pace


def test_without_a_time_the_budget_stays() -> None:
    pace = Pace(2048, None)
    pace.took(2048, 100.0)
    assert pace.budget == 2048


def test_steps_come_to_take_as_long_as_they_should_at_any_speed() -> None:
    for tokens_per_second in (100.0, 1_000.0, 5_000.0):
        pace = Pace(2048, 0.25)
        assert pace.budget == FIRST_STEP_TOKENS
        for _ in range(20):
            pace.took(pace.budget, pace.budget / tokens_per_second)
        expected = min(max(0.25 * tokens_per_second, MIN_STEP_TOKENS), 2048)
        assert abs(pace.budget - expected) <= 1


def test_one_step_that_was_held_up_halves_the_budget_at_most_and_a_small_one_says_nothing() -> None:
    pace = Pace(2048, 0.25)
    pace.took(256, 60.0)
    assert pace.budget == 128
    pace.took(63, 60.0)
    assert pace.budget == 128


def test_no_machine_is_so_slow_that_nothing_is_read() -> None:
    pace = Pace(2048, 0.25)
    for _ in range(50):
        pace.took(pace.budget, 1e6)
    assert pace.budget == MIN_STEP_TOKENS
